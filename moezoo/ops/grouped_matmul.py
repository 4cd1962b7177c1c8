"""Rows sorted by expert times stacked matrices, as Pallas kernels for NVIDIA GPUs (Triton).

    y_s = x_s W_e + b_e        for the rows s of expert e's group

and the derivatives of rows, matrices and biases. Groups are neighbours and have any size, 0
included. A program works on a tile of rows for one group, so a tile on a border is visited once for
each group in it, and a visit reads and writes rows of its own group only: values in other rows, NaN
included, have no way in. Products are summed in float32.

On a CPU the same kernels run in Pallas's interpreter, which is slow and for tests. JAX deprecates
Triton below Pallas from 0.11 on, in favour of Mosaic GPU; all versions that pyproject.toml allows
have it.
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

LEAST = 16  # smallest side of a tile that tensor cores multiply
NEIGHBOURS = 8  # visits that share a column of tiles in the order of programs, for the cache's sake


class Tiles(NamedTuple):
    """Sides of the tiles of one program, and how Triton runs it.

    rows: of x.   columns: of y.   inner: what is multiplied and summed in one step.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# By bytes of an element and the rows of an average group: small groups waste rows of large tiles.
# Two operands times stages must fit in a multiprocessor's shared memory (228 KB on Hopper). Not
# tuned on a card yet: `moezoo bench gpu` measures them.
TILES: dict[tuple[int, bool], Tiles] = {
    (2, True): Tiles(128, 128, 64, 8, 3),
    (2, False): Tiles(32, 128, 64, 4, 4),
    (4, True): Tiles(128, 64, 32, 8, 3),
    (4, False): Tiles(32, 64, 32, 4, 4),
}
LARGE_GROUP = 256  # rows of an average group from which on large tiles are used


def tiles_for(x_SD: Array, experts: int) -> Tiles:
    """The tiles for rows of this number and type."""
    size = 2 if x_SD.dtype.itemsize <= 2 else 4
    return TILES[size, x_SD.shape[0] >= LARGE_GROUP * experts]


class Groups(NamedTuple):
    """The rows of each expert: from `start_E` up to `end_E`, int32, ascending without gaps.

    Rows from the last end on belong to nobody; they give 0.
    """

    start_E: Array
    end_E: Array


class Visits(NamedTuple):
    """What each program works on: rows `start_V` to `end_V` of an expert, in tile `tile_V`, int32.

    expert_V is E for rows of nobody. Visits beyond the last one that is needed have no rows.
    """

    expert_V: Array
    tile_V: Array
    start_V: Array
    end_V: Array


def visits(groups: Groups, rows: int, tile: int) -> Visits:
    """The visits of all tiles; their number depends on static sizes only, rows // tile + E."""
    # Nobody's rows are one more group, so that every row of the result is written.
    start = jnp.append(groups.start_E, groups.end_E[-1])
    end = jnp.append(groups.end_E, jnp.int32(rows))
    first = start // tile
    # The formula alone gives an empty group inside a tile one visit.
    count = jnp.where(end > start, (end - 1) // tile - first + 1, 0)
    last = jnp.cumsum(count)
    index_V = jnp.arange(rows // tile + groups.end_E.shape[0], dtype=jnp.int32)
    group_V = jnp.sum(index_V[:, None] >= last, axis=1, dtype=jnp.int32)
    real_V = group_V < last.shape[0]
    group_V = jnp.minimum(group_V, last.shape[0] - 1)
    tile_V = first[group_V] + index_V - (last - count)[group_V]
    return Visits(
        group_V,
        jnp.where(real_V, tile_V, 0),
        jnp.where(real_V, start[group_V], 0),
        jnp.where(real_V, end[group_V], 0),
    )


def _side(size: int, most: int) -> int:
    """The largest power of two up to `most` that divides a size, which is a multiple of LEAST."""
    side = LEAST
    while side * 2 <= most and size % (side * 2) == 0:
        side *= 2
    return side


def _padded(array: Array, axis: int, multiple: int) -> Array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, widths) if widths[axis][1] else array


def _dot(a: Array, b: Array, **transposed: bool) -> Array:
    """The product in float32; of float32 as exact as products are configured to be."""
    asked = getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009  (pyright: unknown)
    exact = asked in ("highest", "float32") and a.dtype == jnp.float32
    # Hopper's tensor cores take float32 as TF32 otherwise, as XLA's own products do.
    return triton.dot(a, b, allow_tf32=not exact, **transposed).astype(jnp.float32)


def _program(columns: int, visited: int) -> tuple[Array, Array]:
    """Visit and column of tiles of this program: neighbours share tiles that the cache holds."""
    index = pl.program_id(0)
    first = index // (NEIGHBOURS * columns) * NEIGHBOURS
    here = jnp.minimum(visited - first, NEIGHBOURS)
    inside = index % (NEIGHBOURS * columns)
    return first + inside % here, inside // here


def _rows_kernel(
    expert_V: Any,
    tile_V: Any,
    start_V: Any,
    end_V: Any,
    x_SD: Any,
    w_EDF: Any,
    b_EF: Any,
    y_SF: Any,
    *,
    tiles: Tiles,
    transposed: bool,
) -> None:
    """One tile of y for one visit. transposed: the matrices are w [E, F, D], used as their own
    transposes.
    """
    experts, inner = w_EDF.shape[0], x_SD.shape[1]
    visit, column = _program(y_SF.shape[1] // tiles.columns, expert_V.shape[0])
    expert, row = expert_V[visit], tile_V[visit] * tiles.rows
    rows, columns = pl.ds(row, tiles.rows), pl.ds(column * tiles.columns, tiles.columns)
    index_T = row + jnp.arange(tiles.rows)
    own_T1 = ((index_T >= start_V[visit]) & (index_T < end_V[visit]))[:, None]
    own = jnp.minimum(expert, experts - 1)  # of nobody any one: its rows are not multiplied

    def step(i: Array, sum_TC: Array) -> Array:
        part = pl.ds(i * tiles.inner, tiles.inner)
        x_TI = triton.load(x_SD.at[rows, part], mask=own_T1, other=0)
        if transposed:
            return sum_TC + _dot(x_TI, triton.load(w_EDF.at[own, columns, part]), trans_b=True)
        return sum_TC + _dot(x_TI, triton.load(w_EDF.at[own, part, columns]))

    steps = jnp.where(expert < experts, inner // tiles.inner, 0)
    sum_TC = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    sum_TC = lax.fori_loop(0, steps, step, sum_TC)
    if b_EF is not None:
        b_C = triton.load(b_EF.at[own, columns]).astype(jnp.float32)
        sum_TC += jnp.where(expert < experts, b_C, 0.0)
    triton.store(y_SF.at[rows, columns], sum_TC.astype(y_SF.dtype), mask=own_T1)


def _rows(x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups, transposed: bool) -> Array:
    """[S, F] of x [S, D], or with `transposed` [S, D] of x [S, F]."""
    width = w_EDF.shape[1] if transposed else w_EDF.shape[2]
    tiles = tiles_for(x_SD, w_EDF.shape[0])
    x = _padded(_padded(x_SD, 0, tiles.rows), 1, LEAST)
    w = _padded(_padded(w_EDF, 1, LEAST), 2, LEAST)
    b = None if b_EF is None else _padded(b_EF, 1, LEAST)
    columns = w.shape[1] if transposed else w.shape[2]
    tiles = tiles._replace(
        columns=_side(columns, tiles.columns), inner=_side(x.shape[1], tiles.inner)
    )
    plan = visits(groups, x.shape[0], tiles.rows)
    kernel = partial(_rows_kernel, tiles=tiles, transposed=transposed)
    arrays = (*plan, x, w) if b is None else (*plan, x, w, b)
    y = _call(
        kernel if b is not None else _without_bias(kernel),
        jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype),
        plan.expert_V.shape[0] * (columns // tiles.columns),
        tiles,
    )(*arrays)
    return y[: x_SD.shape[0], :width]


def _without_bias(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel of arrays among which there is no bias."""

    def called(*refs: Any) -> None:
        *inputs, y = refs
        kernel(*inputs, None, y)

    return called


def _matrices_kernel(
    start_E: Any,
    end_E: Any,
    x_SD: Any,
    dy_SF: Any,
    dw_EDF: Any,
    db_EF: Any,
    *,
    tiles: Tiles,
    side: int,
) -> None:
    """One tile [side, columns] of an expert's derivative: the sum over its group of x dy^T."""
    across, down = dw_EDF.shape[2] // tiles.columns, dw_EDF.shape[1] // side
    index = pl.program_id(0)
    expert, place = index // (across * down), index % (across * down)
    begin, column = place // across, place % across
    features = pl.ds(begin * side, side)
    columns = pl.ds(column * tiles.columns, tiles.columns)
    start, end = start_E[expert], end_E[expert]
    first = start // tiles.rows

    def step(i: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        row = (first + i) * tiles.rows
        index_T = row + jnp.arange(tiles.rows)
        own_T1 = ((index_T >= start) & (index_T < end))[:, None]
        x_TD = triton.load(x_SD.at[pl.ds(row, tiles.rows), features], mask=own_T1, other=0)
        dy_TF = triton.load(dy_SF.at[pl.ds(row, tiles.rows), columns], mask=own_T1, other=0)
        dw_DF, db_F = sums
        db_F += jnp.sum(dy_TF.astype(jnp.float32), axis=0)
        return dw_DF + _dot(x_TD, dy_TF, trans_a=True), db_F

    steps = jnp.where(end > start, (end - 1) // tiles.rows - first + 1, 0)
    zeros = jnp.zeros((side, tiles.columns), jnp.float32), jnp.zeros(tiles.columns, jnp.float32)
    dw_DF, db_F = lax.fori_loop(0, steps, step, zeros)
    triton.store(dw_EDF.at[expert, features, columns], dw_DF.astype(dw_EDF.dtype))
    # The first row of tiles writes the biases' derivative, the others would write the same.
    here = jnp.broadcast_to(begin == 0, (tiles.columns,))
    triton.store(db_EF.at[expert, columns], db_F.astype(db_EF.dtype), mask=here)


def _matrices(x_SD: Array, dy_SF: Array, groups: Groups, types: Any) -> tuple[Array, Array]:
    """The derivatives [E, D, F] and [E, F] of matrices and biases, in the given types."""
    (d, f), experts = (x_SD.shape[1], dy_SF.shape[1]), groups.end_E.shape[0]
    tiles = tiles_for(x_SD, experts)
    x = _padded(_padded(x_SD, 0, tiles.rows), 1, LEAST)
    dy = _padded(_padded(dy_SF, 0, tiles.rows), 1, LEAST)
    side, columns = _side(x.shape[1], 128), _side(dy.shape[1], tiles.columns)
    # Rows are the summed axis here: as many in a step as elsewhere features.
    tiles = tiles._replace(columns=columns, rows=min(tiles.rows, tiles.inner))
    shape = (experts, x.shape[1], dy.shape[1])
    dw, db = _call(
        partial(_matrices_kernel, tiles=tiles, side=side),
        (
            jax.ShapeDtypeStruct(shape, types[0]),
            jax.ShapeDtypeStruct((experts, shape[2]), types[1]),
        ),
        experts * (shape[1] // side) * (shape[2] // columns),
        tiles,
    )(*groups, x, dy)
    return dw[:, :d, :f], db[:, :f]


def _call(kernel: Callable[..., None], out: Any, programs: int, tiles: Tiles) -> Callable[..., Any]:
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(programs,),
        interpret=platform() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
    )


@jax.custom_vjp
def grouped_matmul(x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups) -> Array:
    """Each row times the matrix of its group's expert, plus that expert's bias; [S, F].

    x_SD: float32 or bfloat16, sorted by expert. w_EDF, b_EF: of the same type; the bias may be
    None. Rows of nobody give 0. Reverse-mode derivatives of the first order only.
    """
    return _rows(x_SD, w_EDF, b_EF, groups, transposed=False)


def _forward(x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups) -> Any:
    return _rows(x_SD, w_EDF, b_EF, groups, transposed=False), (x_SD, w_EDF, b_EF, groups)


def _backward(saved: Any, dy_SF: Array) -> Any:
    x_SD, w_EDF, b_EF, groups = saved
    dx_SD = _rows(dy_SF, w_EDF, None, groups, transposed=True)
    types = (w_EDF.dtype, w_EDF.dtype if b_EF is None else b_EF.dtype)
    dw_EDF, db_EF = _matrices(x_SD, dy_SF, groups, types)
    return dx_SD, dw_EDF, None if b_EF is None else db_EF, None


grouped_matmul.defvjp(_forward, _backward)
