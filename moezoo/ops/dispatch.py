"""Routing to a plan: which slot of a buffer each (token, choice) occupies, and back.

A plan is made of integers only. `spread` fills the buffer from tokens and `combine` adds a token's
slots up again. Both directions of both are gathers, so values and gradients do not depend on the
order in which a device happens to add, and an empty slot can never leak into a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Slots(NamedTuple):
    """Where choices stand in a buffer of S slots.

    choice_S: int32, the choice (token * K + rank) in each slot, -1 = empty.
    slot_NK: int32, the slot of each choice, -1 = in no slot (no expert, or dropped).
    """

    choice_S: Array
    slot_NK: Array


class Sorted(NamedTuple):
    """The N*K choices in order of expert.

    order: int32 [N*K], the choice at each row; choices of no expert come last.
    start_E, end_E: int32, first row of each expert's group and one past its last.
    """

    order: Array
    start_E: Array
    end_E: Array


def at(array: Array, index: Array) -> Array:
    """`array[index]` for an index that is known to be inside: no test for it is compiled."""
    return array.at[index].get(mode="promise_in_bounds")


def sort_by_expert(experts_NK: Array, experts: int) -> Sorted:
    """Group choices by expert, in ascending order of choice within a group."""
    n, k = experts_NK.shape
    group = jnp.where(experts_NK < 0, experts, experts_NK).reshape(n * k)
    size_E = jnp.sum(group[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    end_E = jnp.cumsum(size_E)
    return Sorted(_stable_order(group, experts), end_E - size_E, end_E)


def _stable_order(group: Array, experts: int) -> Array:
    """Stable argsort of small integers; one sort of packed integers where they fit in 31 bits."""
    rows = group.shape[0]
    if not isinstance(rows, int) or (experts + 1) * rows >= 2**31:  # int: not a symbolic dimension
        return jnp.argsort(group, stable=True).astype(jnp.int32)
    # The row makes all numbers different, so the sort need not be stable.
    packed = group * rows + jnp.arange(rows, dtype=jnp.int32)
    return jax.lax.sort(packed, is_stable=False) % max(rows, 1)


def rows_of_choices(order: Array) -> Array:
    """The row of each choice, int32 [N*K]: the inverse of `order`."""
    rows = jnp.arange(order.shape[0], dtype=jnp.int32)
    return jnp.zeros_like(order).at[order].set(rows, unique_indices=True)


def sorted_slots(plan: Sorted, k: int) -> Slots:
    """One slot per choice in order of expert, without gaps; S = N*K."""
    row = rows_of_choices(plan.order)
    used = plan.end_E[-1]
    filled = jnp.arange(plan.order.shape[0]) < used
    slot = jnp.where(row < used, row, -1)
    return Slots(jnp.where(filled, plan.order, -1), slot.reshape(-1, k))


class Blocks(NamedTuple):
    """Groups padded to whole blocks of rows: `slots` in order of block, `expert_P` per block.

    first_E, last_E: int32, each expert's first block and one past its last.
    """

    slots: Slots
    expert_P: Array
    first_E: Array
    last_E: Array


def block_slots(plan: Sorted, k: int, block: int) -> Blocks:
    """Pad each expert's group to whole blocks; S = (N*K // block + E) * block, all of static size.

    Every expert has a block, if an empty one. Blocks past the last group hold nothing and name the
    last expert.
    """
    rows = plan.order.shape[0]
    experts = plan.end_E.shape[0]
    # Each group has at most one block that is not full; an empty group's is that one.
    count = rows // block + experts
    blocks_E = jnp.maximum((plan.end_E - plan.start_E + block - 1) // block, 1)
    last_E = jnp.cumsum(blocks_E)
    first_E = last_E - blocks_E
    index_P = jnp.arange(count, dtype=jnp.int32)
    expert_P = jnp.minimum(jnp.sum(index_P[:, None] >= last_E, axis=1), experts - 1)
    offset_PB = (index_P - at(first_E, expert_P))[:, None] * block + jnp.arange(block)
    row_PB = at(plan.start_E, expert_P)[:, None] + offset_PB
    filled_PB = row_PB < at(plan.end_E, expert_P)[:, None]
    choice_PB = jnp.where(filled_PB, at(plan.order, jnp.minimum(row_PB, rows - 1)), -1)
    row = rows_of_choices(plan.order)
    group = jnp.minimum(jnp.sum(row[:, None] >= plan.end_E, axis=1), experts - 1)
    slot = at(first_E, group) * block + row - at(plan.start_E, group)
    slot_NK = jnp.where(row < plan.end_E[-1], slot, -1).reshape(-1, k)
    return Blocks(Slots(choice_PB.reshape(count * block), slot_NK), expert_P, first_E, last_E)


@jax.custom_vjp
def spread(x_ND: Array, plan: Slots) -> Array:
    """Each slot's token, [S, D]; zero in empty slots."""
    return _spread(x_ND, plan)


def _spread(x_ND: Array, plan: Slots) -> Array:
    filled_S1 = (plan.choice_S >= 0)[:, None]
    token_S = jnp.maximum(plan.choice_S, 0) // plan.slot_NK.shape[1]
    # Chosen, not multiplied by 0: what stands in the token taken instead may be NaN.
    return jnp.where(filled_S1, at(x_ND, token_S), jnp.zeros((), x_ND.dtype))


def _add_up(y_SD: Array, weights_NK: Array, plan: Slots) -> Array:
    """Sum over a token's slots of weight times slot, float32 or wider.

    One gather per rank: together they would be kept in memory as [N, K, D] before the sum.
    """
    wide = jnp.promote_types(y_SD.dtype, jnp.float32)
    total_ND = jnp.zeros((plan.slot_NK.shape[0], y_SD.shape[1]), wide)
    for slot_N, weight_N in zip(plan.slot_NK.T, weights_NK.T, strict=True):
        y_ND = at(y_SD, jnp.maximum(slot_N, 0)) * weight_N[:, None]
        total_ND += jnp.where((slot_N >= 0)[:, None], y_ND, 0.0)
    return total_ND


def _spread_backward(plan: Slots, dx_SD: Array) -> tuple[Array, None]:
    # JAX's own derivative of the gather would be a scatter; the plan knows each token's slots.
    dx_ND = _add_up(dx_SD, jnp.ones(plan.slot_NK.shape, dx_SD.dtype), plan)
    return dx_ND.astype(dx_SD.dtype), None


spread.defvjp(lambda x_ND, plan: (_spread(x_ND, plan), plan), _spread_backward)


@jax.custom_vjp
def combine(y_SD: Array, weights_NK: Array, plan: Slots) -> Array:
    """Each token's sum of weight times slot over its choices, [N, D], in float32 or wider."""
    return _add_up(y_SD, weights_NK, plan)


def _combine_forward(y_SD: Array, weights_NK: Array, plan: Slots):
    return _add_up(y_SD, weights_NK, plan), (y_SD, weights_NK, plan)


def _combine_backward(saved, dy_ND: Array):
    y_SD, weights_NK, plan = saved
    filled_S = plan.choice_S >= 0
    weight_S = at(weights_NK.reshape(-1), jnp.maximum(plan.choice_S, 0))
    dy_SD = _spread(dy_ND, plan) * jnp.where(filled_S, weight_S, 0.0)[:, None]
    dweights = []
    for slot_N in plan.slot_NK.T:
        dot_N = jnp.sum(dy_ND * at(y_SD, jnp.maximum(slot_N, 0)), axis=-1)
        dweights.append(jnp.where(slot_N >= 0, dot_N, 0.0))
    dweights_NK = jnp.stack(dweights, axis=-1).astype(weights_NK.dtype)
    return dy_SD.astype(y_SD.dtype), dweights_NK, None


combine.defvjp(_combine_forward, _combine_backward)
