"""Products of rows in blocks with matrices of their experts: kernels for NVIDIA's Hopper GPUs.

Written in Pallas for Mosaic GPU: one warpgroup loads tiles of both operands ahead, two multiply
them with the tensor cores' asynchronous instructions. Each of a fixed number of programs, one for
each multiprocessor, works through its share of the tiles. Blocks, experts and what is asked of the
products: `grouped_matmul`, which takes these kernels where they fit. 16-bit types only.

On a CPU they run in Pallas's interpreter for GPUs (from JAX 0.11 on), which is for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from moezoo.ops.expert import platform
from moezoo.ops.row_products import ProductForm

LINE = 64  # 16-bit numbers in 128 bytes, the widest line that shared memory interleaves
DEPTH = 64  # of one step along the summed axis
STAGES = 4  # most steps that are loaded ahead
AHEAD = 192 * 1024  # bytes of them; with the rooms of results 224 of Hopper's 227 KB
INTERPRETER = "force_gpu_interpret_mode", "InterpretGPUParams"
WORKERS = 2  # warpgroups that multiply


class MosaicTiles(NamedTuple):
    """The tile of one warpgroup, and whether the two lie side by side or one above the other.

    near: columns of tiles that are worked through together, for the cache's sake.
    """

    rows: int
    columns: int
    beside: bool
    near: int = 8

    @property
    def whole(self) -> tuple[int, int]:
        """Rows and columns of both warpgroups' tiles together."""
        if self.beside:
            return self.rows, WORKERS * self.columns
        return WORKERS * self.rows, self.columns


class MosaicTable(NamedTuple):
    """Tiles to choose from for each kind of product, best first."""

    rows: tuple[MosaicTiles, ...]
    matrices: tuple[MosaicTiles, ...]
    gated: tuple[MosaicTiles, ...]
    joined: tuple[MosaicTiles, ...]


_ROWS = (MosaicTiles(128, 128, True), *(MosaicTiles(64, n, False) for n in (256, 192, 128, 64)))
TABLE = MosaicTable(
    # Of those measured on an H200 (bfloat16): bench/README.md.
    rows=_ROWS,
    matrices=(*_ROWS[1:], MosaicTiles(64, 128, True), MosaicTiles(64, 64, True)),
    # Not timed on a card: the largest whose two sums, or four operands, have room.
    gated=(MosaicTiles(64, 128, False), MosaicTiles(64, 64, False)),
    joined=(MosaicTiles(64, 128, False), MosaicTiles(64, 64, False)),
)


def _tiles(choices: tuple[MosaicTiles, ...], rows: int, columns: int) -> MosaicTiles | None:
    """The first whose whole tile divides both."""
    for tiles in choices:
        if rows % tiles.whole[0] == 0 and columns % tiles.whole[1] == 0:
            return tiles
    return None


def _fit(choices: tuple[MosaicTiles, ...], high: int, wide: int, deep: int, dtype: Any) -> bool:
    """Whether there are tiles of results [high, wide] that are sums of `deep` products."""
    fit = _tiles(choices, high, wide) is not None and deep % DEPTH == 0
    return fit and jnp.dtype(dtype).itemsize == 2


def rows_fit(
    form: ProductForm, table: MosaicTable, block: int, inputs: int, outputs: int, dtype: Any
) -> bool:
    """Whether `rows` makes `outputs` numbers of `inputs` in blocks of `block` rows."""
    return _fit(getattr(table, form.kind), block, outputs, inputs, dtype)


def matrices_fit(table: MosaicTable, block: int, inputs: int, outputs: int, dtype: Any) -> bool:
    """Whether `matrices` takes blocks of `block` rows and gives matrices [inputs, outputs]."""
    return _fit(table.matrices, inputs, outputs, block, dtype)


def _lines(dtype: Any) -> tuple[Any, ...]:
    """How a tile lies in shared memory, so that neither copies nor products wait for a bank."""
    return mosaic.TilingTransform((8, LINE)), mosaic.SwizzleTransform(
        LINE * jnp.dtype(dtype).itemsize
    )


def _turned(ref: Any) -> Any:
    """A tile in shared memory as its transpose; JAX 0.10 spells it otherwise."""
    if hasattr(ref, "transpose"):
        return ref.transpose((1, 0))
    return mosaic.transpose_ref(ref, (1, 0))


class _Operand(NamedTuple):
    """The tile of an operand that one step takes, and where it lies by step, in tiles."""

    shape: tuple[int, int]
    place: Callable[[Any], tuple[Any, Any]]


def _pipeline(
    steps: Any, operands: Sequence[_Operand], dtype: Any, multiply: Any, context: Any
) -> Any:
    """Steps along the summed axis, loaded ahead."""
    bytes_of_step = sum(math.prod(one.shape) for one in operands) * jnp.dtype(dtype).itemsize
    return mosaic.emit_pipeline_warp_specialized(
        multiply,
        grid=(steps,),
        memory_registers=40,  # the loading warpgroup needs few; the others take the rest
        in_specs=[
            mosaic.BlockSpec(*operand, transforms=_lines(dtype), memory_space=mosaic.SMEM)
            for operand in operands
        ],
        wg_axis="worker",
        num_compute_wgs=WORKERS,
        max_concurrent_steps=min(STAGES, AHEAD // bytes_of_step),
        compute_context=context,
    )


def _nothing(*_: Any) -> None:
    """In place of what a pipeline does, where only its room is asked for."""


def _summed(tiles: MosaicTiles, sums: int, finish: Callable[..., None]) -> Callable[..., None]:
    """A warpgroup's registers for its sums, and what is done with them in the end."""

    def context(run: Callable[[Any], None]) -> None:
        def with_registers(*sum_TC: Any) -> None:
            run(sum_TC)
            finish(*(one[...] for one in sum_TC))

        registers = (mosaic.ACC((tiles.rows, tiles.columns)) for _ in range(sums))
        pl.run_scoped(with_registers, *registers)

    return context


def _each_tile(grid: tuple[int, ...], room_of: Any, dtype: Any, one: Callable[..., None]) -> None:
    """`one(index, worker, buffers, room)` for this processor's tiles; room_of: of a pipeline."""

    def work(buffers: Any, room: Any) -> None:
        worker = lax.axis_index("worker")

        @mosaic.nd_loop(grid, collective_axes="processor")
        def each(place: Any) -> None:
            one(place.index, worker, buffers, room)

        mosaic.wait_smem_to_gmem(0, wait_read_only=True)

    rooms = mosaic.SMEM((WORKERS, 2, LINE, LINE), dtype, transforms=_lines(dtype))
    pl.run_scoped(work, room_of, rooms, collective_axes="worker")


class _Share(NamedTuple):
    """What one warpgroup has of the tile of both."""

    rows: Any
    columns: Any


def _share(tiles: MosaicTiles, worker: Array) -> _Share:
    if tiles.beside:
        return _Share(slice(None), pl.ds(worker * tiles.columns, tiles.columns))
    return _Share(pl.ds(worker * tiles.rows, tiles.rows), slice(None))


def _store(value: Array, room: Any, worker: Array, out: Any, tiles: MosaicTiles) -> None:
    """A warpgroup's tile to its place `out`, piece by piece through two rooms in turn."""
    across = tiles.columns // LINE
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
    for piece in range(tiles.rows // LINE * across):
        rows = slice(piece // across * LINE, (piece // across + 1) * LINE)
        columns = slice(piece % across * LINE, (piece % across + 1) * LINE)
        mosaic.wait_smem_to_gmem(1, wait_read_only=True)
        room[worker, piece % 2] = value[rows, columns].astype(room.dtype)
        mosaic.commit_smem()
        mosaic.copy_smem_to_gmem(room.at[worker, piece % 2], out.at[rows, columns])


def _call(body: Callable[..., None], out: Any, *arrays: Array) -> Any:
    kernel = mosaic.kernel(
        body,
        out_type=out,
        grid=(_multiprocessors(),),
        grid_names=("processor",),
        num_threads=WORKERS + 1,
        thread_name="worker",
        compiler_params=mosaic.CompilerParams(
            lowering_semantics=mosaic.LoweringSemantics.Warpgroup
        ),
    )
    if platform() == "cpu":
        # Looked up by name: JAX 0.10 has neither.
        mode, settings = (getattr(mosaic, name) for name in INTERPRETER)
        with mode(settings()):
            return kernel(*arrays)
    return kernel(*arrays)


def _multiprocessors() -> int:
    if platform() == "cpu":
        return 2
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 132
    return jax.devices()[0].core_count  # pyright: ignore[reportAttributeAccessIssue]


def rows(
    form: ProductForm, arrays: tuple[Array, ...], expert_P: Array, used: Array, table: MosaicTable
) -> tuple[Array, ...]:
    """What a form makes of its operands, `arrays`; [S, F] each.

    expert_P: int32, the expert of each block. used: int32, the number of blocks that hold rows; the
    rest is not written.
    """
    (s, inner), dtype = arrays[0].shape, arrays[0].dtype
    width = form.width(arrays)
    tiles = _tiles(getattr(table, form.kind), s // expert_P.shape[0], width)
    assert tiles is not None, "it does not fit"
    high, wide = tiles.whole
    left = _Operand((high, DEPTH), lambda i: (0, i))
    right = _Operand((DEPTH, wide), lambda i: (i, 0))
    if form.transposed:
        right = _Operand((wide, DEPTH), lambda i: (0, i))
    rights = len(arrays) - form.lefts - form.biased
    operands = [left] * form.lefts + [right] * rights
    pipeline = partial(_pipeline, inner // DEPTH, operands, dtype)
    body = partial(_rows_kernel, form=form, tiles=tiles, pipeline=pipeline)
    result = jax.ShapeDtypeStruct((s, width), dtype)
    return _call(body, (result,) * form.outputs, expert_P, used.reshape(1), *arrays)


def _rows_kernel(
    expert_P: Any, used: Any, *refs: Any, form: ProductForm, tiles: MosaicTiles, pipeline: Any
) -> None:
    """refs: the operands, then the results."""
    given = len(refs) - form.outputs
    outs, (lefts, rights) = refs[given:], (refs[: form.lefts], refs[form.lefts : given])
    b_EF, rights = (rights[-1], rights[:-1]) if form.biased else (None, rights)
    (high, wide), (s, width) = tiles.whole, outs[0].shape
    grid, per_block = (s // high, width // wide), s // expert_P.shape[0] // high

    def one(index: Any, worker: Array, buffers: Any, room: Any) -> None:
        i, j = mosaic.planar_snake(index[0], grid, 0, tiles.near)
        block, own = lax.div(i, jnp.int32(per_block)), _share(tiles, worker)

        @pl.when(block < used[0])
        def multiplied() -> None:
            expert = expert_P[block]
            here, columns = pl.ds(i * high, high), pl.ds(j * wide, wide)

            def finish(*sums: Array) -> None:
                b_C = None if b_EF is None else _bias(b_EF, expert, j, worker, tiles)
                for out, value in zip(outs, form.results(*sums, b_C), strict=True):
                    place = out.at[here, columns].at[own.rows, own.columns]
                    _store(value, room, worker, place, tiles)

            def multiply(_: Any, *operands: Any) -> Any:
                *parts, sums = operands
                for left, right, total in form.pairs:
                    w = parts[len(lefts) + right]
                    w = _turned(w.at[own.columns]) if form.transposed else w.at[:, own.columns]
                    mosaic.wgmma(sums[total], parts[left].at[own.rows], w)
                mosaic.wgmma_wait(0)
                return sums

            part = (expert, columns) if form.transposed else (expert, slice(None), columns)
            run = pipeline(multiply, _summed(tiles, form.sums, finish))
            near = (*(x.at[here, :] for x in lefts), *(w.at[part] for w in rights))
            run(*near, allocations=buffers)

    rooms = pipeline(_nothing, _nothing).get_allocations(*lefts, *(w.at[0] for w in rights))
    _each_tile((grid[0] * grid[1],), rooms, lefts[0].dtype, one)


def _bias(b_EF: Any, expert: Array, column: Array, worker: Array, tiles: MosaicTiles) -> Array:
    """A warpgroup's part of an expert's bias, float32."""
    begin = column * tiles.whole[1] + (worker * tiles.columns if tiles.beside else 0)
    part = b_EF.at[expert, pl.ds(begin, tiles.columns)]
    # JAX 0.10 asks for an index, 0.12 takes none.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    load: Any = partial(mosaic.load, layout=mosaic.Layout.WGMMA.reduce(0), optimized=False)
    return load(part, *index).astype(jnp.float32)


def matrices(
    x_SD: Array, dy_SF: Array, first_E: Array, last_E: Array, block: int, *, table: MosaicTable
) -> Array:
    """The matrices' derivatives [E, D, F]: for each expert the sum over its rows of x dy^T.

    first_E, last_E: int32, each expert's first block and one past its last; at least one.
    """
    form = jax.ShapeDtypeStruct((first_E.shape[0], x_SD.shape[1], dy_SF.shape[1]), x_SD.dtype)
    tiles = _tiles(table.matrices, *form.shape[1:])
    assert tiles is not None, "it does not fit"
    body = partial(_matrices_kernel, tiles=tiles, per_block=block // DEPTH)
    return _call(body, (form,), first_E, last_E, x_SD, dy_SF)[0]


def _matrices_kernel(
    first_E: Any, last_E: Any, x_SD: Any, dy_SF: Any, dw_EDF: Any, *, tiles: MosaicTiles,
    per_block: int,
) -> None:  # fmt: skip
    (high, wide), (experts, d, f), dtype = tiles.whole, dw_EDF.shape, x_SD.dtype
    grid = d // high, f // wide

    def pipeline(steps: Any, first: Any, multiply: Any, context: Any) -> Any:
        left = _Operand((DEPTH, high), lambda i: (first + i, 0))
        right = _Operand((DEPTH, wide), lambda i: (first + i, 0))
        return _pipeline(steps, (left, right), dtype, multiply, context)

    def one(index: Any, worker: Array, buffers: Any, room: Any) -> None:
        expert, own = index[0], _share(tiles, worker)
        i, j = mosaic.planar_snake(index[1], grid, 0, tiles.near)
        features, columns = pl.ds(i * high, high), pl.ds(j * wide, wide)
        first = first_E[expert] * per_block

        def finish(value: Array) -> None:
            out = dw_EDF.at[expert, features, columns].at[own.rows, own.columns]
            _store(value, room, worker, out, tiles)

        def multiply(_: Any, x: Any, dy: Any, sums: Any) -> Any:
            mosaic.wgmma(sums[0], _turned(x.at[:, own.rows]), dy.at[:, own.columns])
            mosaic.wgmma_wait(0)
            return sums

        steps = last_E[expert] * per_block - first
        run = pipeline(steps, first, multiply, _summed(tiles, 1, finish))
        run(x_SD.at[:, features], dy_SF.at[:, columns], allocations=buffers)

    # How many steps there are is not known here. Of fewer than stages, rooms stay empty.
    room_of = pipeline(STAGES, 0, _nothing, _nothing).get_allocations(x_SD, dy_SF)
    _each_tile((experts, grid[0] * grid[1]), room_of, dtype, one)
