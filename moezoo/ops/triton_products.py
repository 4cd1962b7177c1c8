"""Products of rows in blocks with matrices of their experts: kernels in Triton's language.

For any NVIDIA GPU, any type and any width; `mosaic_products` is faster where it fits. Written in
Pallas; products are summed in float32. What is asked of them: `grouped_matmul`.

On a CPU they run in Pallas's interpreter, which is for tests. JAX deprecates Triton below Pallas
from 0.11 on, in favour of Mosaic GPU; all versions that pyproject.toml allows have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moezoo.ops.expert import platform

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


# By bytes of a number and whether a block is large. Two operands times stages must fit in a
# multiprocessor's shared memory (227 KB on Hopper).
TILES: dict[tuple[int, bool], TritonTiles] = {
    (2, True): TritonTiles(128, 256, 64, 8, 3),
    (2, False): TritonTiles(128, 128, 64, 4, 4),
    (4, True): TritonTiles(128, 128, 32, 8, 3),
    (4, False): TritonTiles(128, 64, 32, 4, 4),
}


def _tiles(x_SD: Array, rows: int, columns: int, inner: int) -> TritonTiles:
    size = 2 if x_SD.dtype.itemsize <= 2 else 4
    most = TILES[size, rows >= 128]
    return most._replace(
        rows=_side(rows, most.rows),
        columns=_side(columns, most.columns),
        inner=_side(inner, most.inner),
    )


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
    x_SD: Array,
    w_EDF: Array,
    b_EF: Array | None,
    expert_P: Array,
    used: Array,
    *,
    transposed: bool = False,
) -> Array:
    """Each block of rows times its expert's matrix, plus the bias: [S, F].

    x_SD: P blocks of S / P rows, a multiple of 16. expert_P: int32, their experts. used: int32,
    the number of blocks that hold rows; the rest gives 0. transposed: x [S, F] times the matrices'
    transposes.
    """
    s, blocks = x_SD.shape[0], expert_P.shape[0]
    width = w_EDF.shape[1] if transposed else w_EDF.shape[2]
    x, w = _padded(x_SD, 1), _padded(_padded(w_EDF, 1), 2)
    bias = () if b_EF is None else (_padded(b_EF, 1),)
    wide = w.shape[1] if transposed else w.shape[2]
    tiles = _tiles(x, s // blocks, wide, x.shape[1])
    down, across, per_block = s // tiles.rows, wide // tiles.columns, s // blocks // tiles.rows

    def kernel(expert_P: Any, used: Any, x_SD: Any, w_EDF: Any, *rest: Any) -> None:
        i, j = _place(pl.program_id(0), down, across)
        block, y_SF = i // per_block, rest[-1]
        own = expert_P[block]
        here, columns = pl.ds(i * tiles.rows, tiles.rows), pl.ds(j * tiles.columns, tiles.columns)

        def step(i: Array, sum_TC: Array) -> Array:
            part = pl.ds(i * tiles.inner, tiles.inner)
            x_TI = triton.load(x_SD.at[here, part])
            if transposed:
                return sum_TC + _dot(x_TI, triton.load(w_EDF.at[own, columns, part]), trans_b=True)
            return sum_TC + _dot(x_TI, triton.load(w_EDF.at[own, part, columns]))

        holds = (block < used[0]).astype(jnp.int32)
        # Not `where`: Triton's lowering gives a chosen constant one bit.
        steps = holds * jnp.int32(x_SD.shape[1] // tiles.inner)
        sum_TC = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        sum_TC = lax.fori_loop(jnp.int32(0), steps, step, sum_TC)
        if bias:
            b_C = triton.load(rest[0].at[own, columns]).astype(jnp.float32)
            sum_TC += b_C * holds.astype(jnp.float32)
        triton.store(y_SF.at[here, columns], sum_TC.astype(y_SF.dtype))

    form = jax.ShapeDtypeStruct((s, wide), x.dtype)
    y = _call(kernel, form, down * across, tiles)(expert_P, used.reshape(1), x, w, *bias)
    return y[:, :width]


def matrices(x_SD: Array, dy_SF: Array, first_E: Array, last_E: Array, block: int) -> Array:
    """The matrices' derivatives [E, D, F]: for each expert the sum over its rows of x dy^T.

    first_E, last_E: int32, each expert's first block of `block` rows and one past its last.
    """
    (d, f), experts = (x_SD.shape[1], dy_SF.shape[1]), first_E.shape[0]
    x, dy = _padded(x_SD, 1), _padded(dy_SF, 1)
    high, wide = x.shape[1], dy.shape[1]
    tiles = _tiles(x, high, wide, block)
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
