"""Products of rows in blocks with matrices of their experts: kernels in Triton's language.

For any NVIDIA GPU, any type and any width; `mosaic_products` is faster where it fits. Written in
Pallas; products are summed in float32. What is asked of them: `grouped_matmul`.

On a CPU they run in Pallas's interpreter, which is for tests. JAX deprecates Triton below Pallas
from 0.11 on, in favour of Mosaic GPU; all versions that pyproject.toml allows have it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moezoo.ops.expert import platform
from moezoo.ops.row_products import ProductForm

LEAST = 16  # smallest side of a tile that tensor cores multiply
NEIGHBOURS = 8  # tiles above each other that are worked through together, for the cache's sake


class TritonTiles(NamedTuple):
    """Sides of the tile of one program, and how Triton runs it.

    rows: of x, or of a matrix's derivative.   columns: of the result.   inner: what is multiplied
    and summed in one step.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


class TritonTable(NamedTuple):
    """The largest tiles of each kind of product, for numbers of at most 2 bytes and for wider ones.

    rows: of large blocks or matrices. small: of small ones. Operands times stages must fit in a
    multiprocessor's shared memory (227 KB on Hopper).
    """

    rows: tuple[TritonTiles, TritonTiles]
    small: tuple[TritonTiles, TritonTiles]
    gated: tuple[TritonTiles, TritonTiles]
    joined: tuple[TritonTiles, TritonTiles]


TABLE = TritonTable(
    rows=(TritonTiles(128, 256, 64, 8, 3), TritonTiles(128, 128, 32, 8, 3)),
    small=(TritonTiles(128, 128, 64, 4, 4), TritonTiles(128, 64, 32, 4, 4)),
    # Not timed on a card: half the columns of `rows`, for two sums, or as much in half the stages.
    gated=(TritonTiles(128, 128, 64, 8, 3), TritonTiles(128, 64, 32, 8, 3)),
    joined=(TritonTiles(128, 128, 64, 8, 3), TritonTiles(128, 64, 32, 8, 3)),
)


def _tiles(
    most: tuple[TritonTiles, TritonTiles], x_SD: Array, rows: int, columns: int, inner: int
) -> TritonTiles:
    best = most[0 if x_SD.dtype.itemsize <= 2 else 1]
    return best._replace(
        rows=_side(rows, best.rows),
        columns=_side(columns, best.columns),
        inner=_side(inner, best.inner),
    )


def _by_size(table: TritonTable, rows: int) -> tuple[TritonTiles, TritonTiles]:
    return table.rows if rows >= 128 else table.small


def _side(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a size, which is a multiple of LEAST."""
    side = LEAST
    while side * 2 <= most and size % (side * 2) == 0:
        side *= 2
    return side


def _padded(array: Array, axis: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % LEAST)
    return jnp.pad(array, widths) if widths[axis][1] else array


def _dot(a: Array, b: Array, **transposed: bool) -> Array:
    """The product in float32; of float32 as exact as products are configured to be."""
    asked = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  (pyright: unknown)
    exact = asked in ("highest", "float32") and a.dtype == jnp.float32
    # Hopper's tensor cores take float32 as TF32 otherwise, as XLA's own products do.
    return triton.dot(a, b, allow_tf32=not exact, **transposed).astype(jnp.float32)


def _place(index: Array, down: int, across: int) -> tuple[Array, Array]:
    """Row and column of tiles: neighbours in time share tiles that the cache holds."""
    first = index // (NEIGHBOURS * across) * NEIGHBOURS
    here = jnp.minimum(down - first, NEIGHBOURS)
    inside = index % (NEIGHBOURS * across)
    return first + inside % here, inside // here


def _call(kernel: Callable[..., None], out: Any, programs: int, tiles: TritonTiles) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(programs,),
        interpret=platform() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    )


def rows(
    form: ProductForm, arrays: tuple[Array, ...], expert_P: Array, used: Array, table: TritonTable
) -> tuple[Array, ...]:
    """What a form makes of its operands, `arrays`; [S, F] each.

    expert_P: int32, the expert of each block, of a multiple of 16 rows. used: int32, the number of
    blocks that hold rows; the rest gives what the form makes of 0.
    """
    s, block = arrays[0].shape[0], arrays[0].shape[0] // expert_P.shape[0]
    width = form.width(arrays)
    # Every axis but those of rows and of experts.
    given = tuple(_padded(a, 1) if a.ndim == 2 else _padded(_padded(a, 1), 2) for a in arrays)
    wide = form.width(given)
    most = _by_size(table, block) if form.kind == "rows" else getattr(table, form.kind)
    tiles = _tiles(most, given[0], block, wide, given[0].shape[1])
    result = jax.ShapeDtypeStruct((s, wide), arrays[0].dtype)
    programs = (s // tiles.rows) * (wide // tiles.columns)
    call = _call(
        partial(_rows_kernel, form=form, tiles=tiles), [result] * form.outputs, programs, tiles
    )
    return tuple(y[:, :width] for y in call(expert_P, used.reshape(1), *given))


def _rows_kernel(
    expert_P: Any, used: Any, *refs: Any, form: ProductForm, tiles: TritonTiles
) -> None:
    """refs: the operands, then the results."""
    given = len(refs) - form.outputs
    outs, (lefts, rights) = refs[given:], (refs[: form.lefts], refs[form.lefts : given])
    down, across = outs[0].shape[0] // tiles.rows, outs[0].shape[1] // tiles.columns
    i, j = _place(pl.program_id(0), down, across)
    block = i // (down // expert_P.shape[0])
    own = expert_P[block]
    here, columns = pl.ds(i * tiles.rows, tiles.rows), pl.ds(j * tiles.columns, tiles.columns)

    def step(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        part, made = pl.ds(i * tiles.inner, tiles.inner), list(sums)
        x = [triton.load(one.at[here, part]) for one in lefts]
        for left, right, total in form.pairs:
            if form.transposed:
                w = triton.load(rights[right].at[own, columns, part])
            else:
                w = triton.load(rights[right].at[own, part, columns])
            made[total] += _dot(x[left], w, trans_b=form.transposed)
        return tuple(made)

    holds = (block < used[0]).astype(jnp.int32)
    # Not `where`: Triton's lowering gives a chosen constant one bit.
    steps = holds * jnp.int32(lefts[0].shape[1] // tiles.inner)
    none = tuple(jnp.zeros((tiles.rows, tiles.columns), jnp.float32) for _ in range(form.sums))
    sums = lax.fori_loop(jnp.int32(0), steps, step, none)
    b_C = None
    if form.biased:
        b_C = triton.load(rights[-1].at[own, columns]).astype(jnp.float32)
        b_C *= holds.astype(jnp.float32)
    for out, value in zip(outs, form.results(*sums, b_C), strict=True):
        triton.store(out.at[here, columns], value.astype(out.dtype))


def matrices(
    x_SD: Array, dy_SF: Array, first_E: Array, last_E: Array, block: int, *, table: TritonTable
) -> Array:
    """The matrices' derivatives [E, D, F]: for each expert the sum over its rows of x dy^T.

    first_E, last_E: int32, each expert's first block of `block` rows and one past its last.
    """
    (d, f), experts = (x_SD.shape[1], dy_SF.shape[1]), first_E.shape[0]
    x, dy = _padded(x_SD, 1), _padded(dy_SF, 1)
    high, wide = x.shape[1], dy.shape[1]
    tiles = _tiles(_by_size(table, high), x, high, wide, block)
    down, across = high // tiles.rows, wide // tiles.columns

    def kernel(first_E: Any, last_E: Any, x_SD: Any, dy_SF: Any, dw_EDF: Any) -> None:
        index = pl.program_id(0)
        expert, (i, j) = index // (down * across), _place(index % (down * across), down, across)
        features = pl.ds(i * tiles.rows, tiles.rows)
        columns = pl.ds(j * tiles.columns, tiles.columns)

        def step(i: Array, sum_DC: Array) -> Array:
            part = pl.ds(i * tiles.inner, tiles.inner)
            x_TD, dy_TC = triton.load(x_SD.at[part, features]), triton.load(dy_SF.at[part, columns])
            return sum_DC + _dot(x_TD, dy_TC, trans_a=True)

        begin, end = (edge[expert] * (block // tiles.inner) for edge in (first_E, last_E))
        sum_DC = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        sum_DC = lax.fori_loop(begin, end, step, sum_DC)
        triton.store(dw_EDF.at[expert, features, columns], sum_DC.astype(dw_EDF.dtype))

    form = jax.ShapeDtypeStruct((experts, high, wide), x.dtype)
    dw = _call(kernel, form, experts * down * across, tiles)(first_E, last_E, x, dy)
    return dw[:, :d, :f]
