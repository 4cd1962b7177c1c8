"""Products of rows in blocks with matrices of their experts: kernels for NVIDIA's Hopper GPUs.

Written in Pallas for Mosaic GPU: one warpgroup loads tiles of both operands ahead, two multiply
them with the tensor cores' asynchronous instructions. Each of a fixed number of programs, one for
each multiprocessor, works through its share of the tiles. Blocks, experts and what is asked of the
products: `grouped_matmul`, which takes these kernels where they fit. 16-bit types only.

On a CPU they run in Pallas's interpreter for GPUs (from JAX 0.11 on), which is for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from moezoo.ops.expert import Activation, platform

LINE = 64  # 16-bit numbers in 128 bytes, the widest line that shared memory interleaves
DEPTH = 64  # of one step along the summed axis
STAGES = 4  # steps that are loaded ahead; with the tiles below 224 of Hopper's 227 KB
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


# Best first, of those measured on an H200 (bfloat16): bench/README.md.
ROWS = (MosaicTiles(128, 128, True), *(MosaicTiles(64, n, False) for n in (256, 192, 128, 64)))
MATRICES = (*ROWS[1:], MosaicTiles(64, 128, True), MosaicTiles(64, 64, True))


def _tiles(choices: tuple[MosaicTiles, ...], rows: int, columns: int) -> MosaicTiles | None:
    """The first whose whole tile divides both."""
    for tiles in choices:
        if rows % tiles.whole[0] == 0 and columns % tiles.whole[1] == 0:
            return tiles
    return None


def rows_fit(block: int, inputs: int, outputs: int, dtype: Any) -> bool:
    """Whether `rows` takes blocks of `block` rows and makes `outputs` numbers of `inputs`."""
    fit = _tiles(ROWS, block, outputs) is not None and inputs % DEPTH == 0
    return fit and jnp.dtype(dtype).itemsize == 2


def matrices_fit(block: int, inputs: int, outputs: int, dtype: Any) -> bool:
    """Whether `matrices` takes blocks of `block` rows and gives matrices [inputs, outputs]."""
    fit = _tiles(MATRICES, inputs, outputs) is not None and block % DEPTH == 0
    return fit and jnp.dtype(dtype).itemsize == 2


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
    steps: Any, left: _Operand, right: _Operand, dtype: Any, multiply: Any, context: Any
) -> Any:
    """Steps along the summed axis, loaded ahead."""
    return mosaic.emit_pipeline_warp_specialized(
        multiply,
        grid=(steps,),
        memory_registers=40,  # the loading warpgroup needs few; the others take the rest
        in_specs=[
            mosaic.BlockSpec(*operand, transforms=_lines(dtype), memory_space=mosaic.SMEM)
            for operand in (left, right)
        ],
        wg_axis="worker",
        num_compute_wgs=WORKERS,
        max_concurrent_steps=STAGES,
        compute_context=context,
    )


def _nothing(*_: Any) -> None:
    """In place of what a pipeline does, where only its room is asked for."""


def _summed(tiles: MosaicTiles, finish: Callable[[Array], None]) -> Callable[..., None]:
    """A warpgroup's registers for its sum, and what is done with it in the end."""

    def context(run: Callable[[Any], None]) -> None:
        def with_registers(sum_TC: Any) -> None:
            run(sum_TC)
            finish(sum_TC[...])

        pl.run_scoped(with_registers, mosaic.ACC((tiles.rows, tiles.columns)))

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


# erf(x) = x P(x^2) up to |x| = 3, where it is 1 but for 2e-5: P's coefficients, lowest first,
# fitted for the least greatest error, 3.2e-5. A sixtieth of what 16-bit results are rounded by.
ERF = (
    1.1282684,
    -0.37531483,
    0.11107927,
    -0.025102811,
    0.0042354087,
    -0.00051103282,
    4.1060037e-05,
    -1.9447916e-06,
    4.0741284e-08,
)
PRIMITIVES = frozenset(
    ("abs", "add", "clamp", "convert_element_type", "div", "erf", "exp", "integer_pow", "logistic")
    + ("lt", "max", "min", "mul", "neg", "select_n", "square", "sub", "tanh")
)
CALLS = ("call_jaxpr", "jaxpr")  # where functions inside functions keep their own steps


def _erf(x: Array) -> Array:
    x = jnp.clip(x, -3.0, 3.0)
    square, total = x * x, jnp.full_like(x, ERF[-1])
    for coefficient in ERF[-2::-1]:
        total = total * square + coefficient
    return x * total


def _inner(eqn: Any) -> Any:
    """The steps of a function that this step calls, or None."""
    return next((eqn.params[name] for name in CALLS if name in eqn.params), None)


def _plain(jaxpr: Any) -> bool:
    """Whether all steps are known to be cheap and to have a form in these kernels."""
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        if not (_plain(inner.jaxpr) if inner is not None else eqn.primitive.name in PRIMITIVES):
            return False
    return True


def _evaluated(closed: Any, *values: Any) -> Any:
    """The steps one after the other, erf by its polynomial."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))
    for eqn in jaxpr.eqns:
        given = [v.val if hasattr(v, "val") else known[v] for v in eqn.invars]
        inner = _inner(eqn)
        if inner is not None:
            made = _evaluated(inner, *given)
        elif eqn.primitive.name == "erf":
            made = [_erf(given[0])]
        else:
            made = eqn.primitive.bind(*given, **eqn.params)
            made = made if eqn.primitive.multiple_results else [made]
        known |= dict(zip(eqn.outvars, made, strict=True))
    return [v.val if hasattr(v, "val") else known[v] for v in jaxpr.outvars]


def fuses(activation: Activation) -> bool:
    """Whether an activation can be computed before the results leave the multiprocessor."""
    return _plain(_steps(activation, (8, 8)).jaxpr)


def _steps(activation: Activation, shape: tuple[int, ...]) -> Any:
    return jax.make_jaxpr(activation)(jax.ShapeDtypeStruct(shape, jnp.float32))


class Product(NamedTuple):
    """y [S, F] after the activation, and before it where that is kept, else None."""

    y_SF: Array
    before_SF: Array | None


def rows(
    x_SD: Array,
    w_EDF: Array,
    b_EF: Array | None,
    expert_P: Array,
    used: Array,
    *,
    transposed: bool = False,
    activation: Activation | None = None,
    keep: bool = False,
) -> Product:
    """Each block of rows times its expert's matrix, plus the bias, through the activation.

    x_SD: P blocks of S / P rows. expert_P: int32, their experts. used: int32, the number of blocks
    that hold rows; the rest is not written. transposed: x [S, F] times the matrices' transposes.
    keep: what comes before the activation is returned as well.
    """
    (s, inner), dtype = x_SD.shape, x_SD.dtype
    width = w_EDF.shape[1] if transposed else w_EDF.shape[2]
    tiles = _tiles(ROWS, s // expert_P.shape[0], width)
    assert tiles is not None, "it does not fit"
    right = _Operand((DEPTH, tiles.whole[1]), lambda i: (i, 0))
    if transposed:
        right = _Operand((tiles.whole[1], DEPTH), lambda i: (0, i))
    left = _Operand((tiles.whole[0], DEPTH), lambda i: (0, i))
    pipeline = partial(_pipeline, inner // DEPTH, left, right, dtype)
    body = partial(
        _rows_kernel, tiles=tiles, pipeline=pipeline, transposed=transposed,
        biased=b_EF is not None, activation=activation, keep=keep,
    )  # fmt: skip
    arrays = (expert_P, used.reshape(1), x_SD, w_EDF, *(() if b_EF is None else (b_EF,)))
    form = jax.ShapeDtypeStruct((s, width), dtype)
    made = _call(body, (form, form) if keep else (form,), *arrays)
    return Product(made[-1], made[0] if keep else None)


def _rows_kernel(
    expert_P: Any, used: Any, x_SD: Any, w_EDF: Any, *rest: Any, tiles: MosaicTiles, pipeline: Any,
    transposed: bool, biased: bool, activation: Activation | None, keep: bool,
) -> None:  # fmt: skip
    """rest: the biases where there are some, then the results."""
    b_EF, outs = (rest[0], rest[1:]) if biased else (None, rest)
    (high, wide), (s, width) = tiles.whole, outs[0].shape
    grid, per_block = (s // high, width // wide), s // expert_P.shape[0] // high

    def one(index: Any, worker: Array, buffers: Any, room: Any) -> None:
        i, j = mosaic.planar_snake(index[0], grid, 0, tiles.near)
        block, own = lax.div(i, jnp.int32(per_block)), _share(tiles, worker)

        @pl.when(block < used[0])
        def multiplied() -> None:
            expert = expert_P[block]
            here, columns = pl.ds(i * high, high), pl.ds(j * wide, wide)

            def finish(value: Array) -> None:
                if b_EF is not None:
                    b_C = _bias(b_EF, expert, j, worker, tiles)
                    value += lax.broadcast_in_dim(b_C, value.shape, (1,))
                values = (value, value) if keep else (value,)
                if activation is not None:
                    values = (*values[:-1], *_evaluated(_steps(activation, value.shape), value))
                for out, one in zip(outs, values, strict=True):
                    _store(
                        one, room, worker, out.at[here, columns].at[own.rows, own.columns], tiles
                    )

            def multiply(_: Any, x: Any, w: Any, sum_TC: Any) -> Any:
                w = _turned(w.at[own.columns]) if transposed else w.at[:, own.columns]
                mosaic.wgmma(sum_TC, x.at[own.rows], w)
                mosaic.wgmma_wait(0)
                return sum_TC

            part = (expert, columns) if transposed else (expert, slice(None), columns)
            run = pipeline(multiply, _summed(tiles, finish))
            run(x_SD.at[here, :], w_EDF.at[part], allocations=buffers)

    room_of = pipeline(_nothing, _nothing).get_allocations(x_SD, w_EDF.at[0])
    _each_tile((grid[0] * grid[1],), room_of, x_SD.dtype, one)


def _bias(b_EF: Any, expert: Array, column: Array, worker: Array, tiles: MosaicTiles) -> Array:
    """A warpgroup's part of an expert's bias, float32."""
    begin = column * tiles.whole[1] + (worker * tiles.columns if tiles.beside else 0)
    part = b_EF.at[expert, pl.ds(begin, tiles.columns)]
    # JAX 0.10 asks for an index, 0.12 takes none.
    index = ((),) if jax.__version_info__ < (0, 11) else ()
    load: Any = partial(mosaic.load, layout=mosaic.Layout.WGMMA.reduce(0), optimized=False)
    return load(part, *index).astype(jnp.float32)


def matrices(x_SD: Array, dy_SF: Array, first_E: Array, last_E: Array, block: int) -> Array:
    """The matrices' derivatives [E, D, F]: for each expert the sum over its rows of x dy^T.

    first_E, last_E: int32, each expert's first block and one past its last; at least one.
    """
    form = jax.ShapeDtypeStruct((first_E.shape[0], x_SD.shape[1], dy_SF.shape[1]), x_SD.dtype)
    tiles = _tiles(MATRICES, *form.shape[1:])
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
        return _pipeline(steps, left, right, dtype, multiply, context)

    def one(index: Any, worker: Array, buffers: Any, room: Any) -> None:
        expert, own = index[0], _share(tiles, worker)
        i, j = mosaic.planar_snake(index[1], grid, 0, tiles.near)
        features, columns = pl.ds(i * high, high), pl.ds(j * wide, wide)
        first = first_E[expert] * per_block

        def finish(value: Array) -> None:
            out = dw_EDF.at[expert, features, columns].at[own.rows, own.columns]
            _store(value, room, worker, out, tiles)

        def multiply(_: Any, x: Any, dy: Any, sum_TC: Any) -> Any:
            mosaic.wgmma(sum_TC, _turned(x.at[:, own.rows]), dy.at[:, own.columns])
            mosaic.wgmma_wait(0)
            return sum_TC

        steps = last_E[expert] * per_block - first
        run = pipeline(steps, first, multiply, _summed(tiles, finish))
        run(x_SD.at[:, features], dy_SF.at[:, columns], allocations=buffers)

    # How many steps there are is not known here. Of fewer than stages, rooms stay empty.
    room_of = pipeline(STAGES, 0, _nothing, _nothing).get_allocations(x_SD, dy_SF)
    _each_tile((experts, grid[0] * grid[1]), room_of, dtype, one)
