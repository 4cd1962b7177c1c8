"""Tokens to slots and back on NVIDIA GPUs: the `spread` and `combine` of `dispatch` as kernels.

The same sums in the same order, in passes that read and write each row once: XLA's own fusions of
these gathers reach half of what the memory can do. Written in Pallas for Triton; on a CPU they run
in Pallas's interpreter, which is for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moezoo.ops.dispatch import Slots, at
from moezoo.ops.expert import platform

NUMBERS = 8192  # of a tile that one program holds: 64 for each of its threads
WIDEST = 1024  # columns of a tile
WARPS = 4


def _whole(size: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


class _Tile:
    """Rows and columns of a program's tile, of arrays [rows, width]."""

    def __init__(self, rows: int, width: int):
        self.columns = min(_whole(width), WIDEST)
        self.rows = min(_whole(rows), max(NUMBERS // self.columns, 1))
        self.width, self.down = width, -(-rows // self.rows)
        self.across, self.all_rows = -(-width // self.columns), rows

    def row(self, program: Array) -> tuple[Array, Array]:
        """Index of each row, and whether it exists."""
        index_T = program * self.rows + jnp.arange(self.rows, dtype=jnp.int32)
        return index_T, index_T < self.all_rows

    def column(self, program: Array) -> tuple[Array, Array]:
        """Index of each column, and whether it exists."""
        index_C = program * self.columns + jnp.arange(self.columns, dtype=jnp.int32)
        return index_C, index_C < self.width


def _load(ref: Any, row_T: Array, column_C: Array, wanted_TC: Array) -> Array:
    """Numbers at these rows and columns, 0 where they are not wanted: what stands there is not
    read.
    """
    return triton.load(ref.at[row_T[:, None], column_C[None, :]], mask=wanted_TC, other=0)


def _call(kernel: Callable[..., None], out: Any, grid: tuple[int, ...]) -> Any:
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        interpret=platform() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    )


def _taken(x_ND: Array, choice_S: Array, k: int) -> Array:
    """The token of each slot, 0 where it is empty: [S, D]."""
    tile = _Tile(choice_S.shape[0], x_ND.shape[1])

    def kernel(x_ND: Any, choice_S: Any, y_SD: Any) -> None:
        (row_T, real_T), (column_C, real_C) = (
            tile.row(pl.program_id(0)), tile.column(pl.program_id(1))
        )  # fmt: skip
        choice_T = triton.load(choice_S.at[row_T], mask=real_T, other=-1)
        wanted_TC = (choice_T >= 0)[:, None] & real_C[None, :]
        x_TC = _load(x_ND, jnp.maximum(choice_T, 0) // k, column_C, wanted_TC)
        place = y_SD.at[row_T[:, None], column_C[None, :]]
        triton.store(place, x_TC, mask=real_T[:, None] & real_C[None, :])

    form = jax.ShapeDtypeStruct((choice_S.shape[0], x_ND.shape[1]), x_ND.dtype)
    return _call(kernel, form, (tile.down, tile.across))(x_ND, choice_S)


def _added_up(y_SD: Array, weights_NK: Array | None, slot_NK: Array) -> Array:
    """Each token's sum of weight times slot, [N, D] in the type of y, added up in float32."""
    n, k = slot_NK.shape
    tile = _Tile(n, y_SD.shape[1])

    def kernel(y_SD: Any, slot_NK: Any, *rest: Any) -> None:
        (row_T, real_T), (column_C, real_C) = (
            tile.row(pl.program_id(0)), tile.column(pl.program_id(1))
        )  # fmt: skip
        total_TC = jnp.zeros((tile.rows, tile.columns), jnp.float32)
        for rank in range(k):
            # A place in a flat array, because a column of a matrix has no form in Triton.
            slot_T = triton.load(slot_NK.at[row_T * k + rank], mask=real_T, other=-1)
            wanted_TC = (slot_T >= 0)[:, None] & real_C[None, :]
            y_TC = _load(y_SD, jnp.maximum(slot_T, 0), column_C, wanted_TC).astype(jnp.float32)
            if len(rest) == 2:
                weight_T = triton.load(rest[0].at[row_T * k + rank], mask=real_T, other=0)
                # Chosen: the weight of a choice that went nowhere may be NaN.
                weight_T = jnp.where(slot_T >= 0, weight_T.astype(jnp.float32), 0.0)
                y_TC *= weight_T[:, None]
            total_TC += y_TC
        place = rest[-1].at[row_T[:, None], column_C[None, :]]
        triton.store(place, total_TC.astype(y_SD.dtype), mask=real_T[:, None] & real_C[None, :])

    form = jax.ShapeDtypeStruct((n, y_SD.shape[1]), y_SD.dtype)
    weights = () if weights_NK is None else (weights_NK.reshape(-1),)
    return _call(kernel, form, (tile.down, tile.across))(y_SD, slot_NK.reshape(-1), *weights)


def _pulled(dy_ND: Array, y_SD: Array, weight_S: Array, choice_S: Array, k: int) -> Any:
    """Derivatives of the slots [S, D], and of their weights, float32 [S]."""
    s, d = y_SD.shape
    tile = _Tile(s, d)

    def kernel(
        dy_ND: Any, y_SD: Any, weight_S: Any, choice_S: Any, dslots_SD: Any, dweight_S: Any
    ) -> None:
        row_T, real_T = tile.row(pl.program_id(0))
        choice_T = triton.load(choice_S.at[row_T], mask=real_T, other=-1)
        weight_T = triton.load(weight_S.at[row_T], mask=real_T, other=0).astype(jnp.float32)
        token_T = jnp.maximum(choice_T, 0) // k
        dot_T = jnp.zeros((tile.rows,), jnp.float32)
        for part in range(tile.across):
            column_C, real_C = tile.column(jnp.int32(part))
            wanted_TC = (choice_T >= 0)[:, None] & real_C[None, :]
            dy_TC = _load(dy_ND, token_T, column_C, wanted_TC).astype(jnp.float32)
            y_TC = _load(y_SD, row_T, column_C, wanted_TC).astype(jnp.float32)
            dot_T += jnp.sum(dy_TC * y_TC, axis=1)
            place = dslots_SD.at[row_T[:, None], column_C[None, :]]
            own_TC = (dy_TC * weight_T[:, None]).astype(dslots_SD.dtype)
            triton.store(place, own_TC, mask=real_T[:, None] & real_C[None, :])
        triton.store(dweight_S.at[row_T], dot_T, mask=real_T)

    forms = jax.ShapeDtypeStruct((s, d), y_SD.dtype), jax.ShapeDtypeStruct((s,), jnp.float32)
    return _call(kernel, forms, (tile.down,))(dy_ND, y_SD, weight_S, choice_S)


@jax.custom_vjp
def spread(x_ND: Array, plan: Slots) -> Array:
    """Each slot's token, [S, D]; zero in empty slots."""
    return _taken(x_ND, plan.choice_S, plan.slot_NK.shape[1])


def _spread_forward(x_ND: Array, plan: Slots) -> Any:
    return _taken(x_ND, plan.choice_S, plan.slot_NK.shape[1]), plan


def _spread_backward(plan: Slots, dx_SD: Array) -> Any:
    return _added_up(dx_SD, None, plan.slot_NK), None


spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def combine(y_SD: Array, weights_NK: Array, plan: Slots) -> Array:
    """Each token's sum of weight times slot over its choices, [N, D] in the type of y.

    Added up in float32 and rounded once.
    """
    return _added_up(y_SD, weights_NK, plan.slot_NK)


def _combine_forward(y_SD: Array, weights_NK: Array, plan: Slots) -> Any:
    return _added_up(y_SD, weights_NK, plan.slot_NK), (y_SD, weights_NK, plan)


def _combine_backward(saved: Any, dy_ND: Array) -> Any:
    y_SD, weights_NK, plan = saved
    weight_S = at(weights_NK.reshape(-1), jnp.maximum(plan.choice_S, 0))
    weight_S = jnp.where(plan.choice_S >= 0, weight_S, 0.0)
    dy_SD, dweight_S = _pulled(dy_ND, y_SD, weight_S, plan.choice_S, plan.slot_NK.shape[1])
    dweights_NK = at(dweight_S, jnp.maximum(plan.slot_NK, 0))
    dweights_NK = jnp.where(plan.slot_NK >= 0, dweights_NK, 0.0)
    return dy_SD, dweights_NK.astype(weights_NK.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
