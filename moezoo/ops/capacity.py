"""Experts with a fixed number of slots: choices that find no slot are dropped and counted.

Three questions, each a function: how many slots an expert has, who takes one first (`Priority`),
and what happens to the weights of a token that lost a choice (`Reweigh`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError
from moezoo.ops.dispatch import Slots, combine, rows_of_choices, sort_by_expert, spread
from moezoo.ops.expert import Applied, Backend, ExpertFn, Params, count_experts, dense, nothing
from moezoo.ops.routing import Routing, pick

# Routing -> int32 [N*K], all choices (token * K + rank), who comes first takes a slot first.
Priority = Callable[[Routing], Array]


def by_position(routing: Routing) -> Array:
    """All first choices before all second ones, and so on; within a rank earlier tokens first."""
    return _rank_by_rank(jnp.arange(routing.experts_NK.shape[0]), routing)


def by_probability(routing: Routing) -> Array:
    """Batch priority: rank by rank, tokens that are surest of an expert first.

    V-MoE (arXiv:2106.05974, section 4).
    """
    return _rank_by_rank(_descending(jnp.max(routing.probs_NE, axis=-1)), routing)


def by_position_across_ranks(routing: Routing) -> Array:
    """Earlier tokens first, all of a token's choices alike (DeepSpeed's drop policy 'position')."""
    return jnp.arange(routing.experts_NK.size, dtype=jnp.int32)


def by_probability_across_ranks(routing: Routing) -> Array:
    """The most probable choices first, whatever their rank (DeepSpeed's drop policy 'probs')."""
    return _descending(pick(routing.probs_NE, routing.experts_NK).reshape(-1))


def by_lot(routing: Routing) -> Array:
    """The largest lots first; without lots, by position.

    Random token selection, as in Z-code M3 on DeepSpeed (arXiv:2109.10465): the ends of sequences
    are dropped no more often than their beginnings.
    """
    if routing.lot_NK is None:
        return by_position(routing)
    return _descending(routing.lot_NK.reshape(-1))


def _descending(values: Array) -> Array:
    # Negated, not turned around afterwards: of equal values the earlier one stays first.
    return jnp.argsort(-values, stable=True).astype(jnp.int32)


def _rank_by_rank(token_N: Array, routing: Routing) -> Array:
    k = routing.experts_NK.shape[1]
    return (token_N[:, None] * k + jnp.arange(k)).T.reshape(-1).astype(jnp.int32)


__all__ = [
    "HERE",
    "Priority",
    "Reweigh",
    "Rounding",
    "Stacked",
    "as_chosen",
    "by_position",
    "by_probability",
    "capacity",
    "capacity_slots",
    "expert_capacity",
    "renormalised_after_dropping",
]

Rounding = Callable[[float], int]
Reweigh = Callable[[Array, Array], Array]  # (weights_NK, kept_NK) -> weights_NK


class Stacked(NamedTuple):
    """Where stacked experts are: how many there are, and what applies each to its slots.

    `apply(fn, params, x_ECD)` gives y_ECD.
    """

    count: Callable[[Params], int]
    apply: Callable[[ExpertFn, Params, Array], Array]


def _each(fn: ExpertFn, params: Params, x_ECD: Array) -> Array:
    return jax.vmap(lambda p, x: fn(p, x, dense))(params, x_ECD)


HERE = Stacked(count_experts, _each)


def as_chosen(weights_NK: Array, kept_NK: Array) -> Array:
    """What is left keeps its weight."""
    return weights_NK


def renormalised_after_dropping(weights_NK: Array, kept_NK: Array) -> Array:
    """What is left of a token's choices adds up to 1 (DeepSpeed's top-2 and top-k gates)."""
    kept_weights_NK = jnp.where(kept_NK, weights_NK, 0.0)
    total_N1 = jnp.sum(kept_weights_NK, axis=-1, keepdims=True)
    # A token that lost all its choices gets 0, not 0 / 0.
    return kept_weights_NK / jnp.maximum(total_N1, jnp.finfo(jnp.float32).eps)


def expert_capacity(
    choices: int,
    experts: int,
    factor: float,
    rounding: Rounding = math.ceil,
    multiple_of: int = 1,
    minimum: int = 0,
) -> int:
    """Slots per expert: `factor` times an even share of the choices, rounded, up to a multiple.

    `choices` is tokens times experts per token. V-MoE's rules are `math.ceil` or `round`, with
    `multiple_of` 4; DeepSpeed's is `math.ceil` with a `minimum` of 8. Raises UserError when the
    result is below 1.
    """
    slots = max(int(rounding(choices * factor / experts)), minimum)
    slots += -slots % multiple_of
    if slots < 1:
        raise UserError(
            f"Expert capacity is {slots} slots ({choices} choices, {experts} experts, factor "
            f"{factor}): raise the capacity factor or use a dropless backend."
        )
    return slots


def capacity_slots(routing: Routing, experts: int, slots: int, priority: Priority) -> Slots:
    """Slot e * C + c of each choice: in order of `priority`, the next free slot of its expert."""
    n, k = routing.experts_NK.shape
    order = priority(routing)
    plan = sort_by_expert(routing.experts_NK.reshape(-1)[order][:, None], experts)
    # Choices enter in order of priority, which `sort_by_expert` keeps within each expert.
    row_EC = plan.start_E[:, None] + jnp.arange(slots)
    choice_EC = order[plan.order[jnp.minimum(row_EC, n * k - 1)]]
    choice_EC = jnp.where(row_EC < plan.end_E[:, None], choice_EC, -1)
    row = rows_of_choices(plan.order)
    row_NK = jnp.zeros_like(row).at[order].set(row, unique_indices=True).reshape(n, k)
    expert_NK = jnp.maximum(routing.experts_NK, 0)
    offset_NK = row_NK - plan.start_E[expert_NK]
    kept_NK = (routing.experts_NK >= 0) & (offset_NK < slots)
    slot_NK = jnp.where(kept_NK, expert_NK * slots + offset_NK, -1)
    return Slots(choice_EC.reshape(experts * slots), slot_NK)


def capacity(
    factor: float = 1.25,
    *,
    slots: int | None = None,
    rounding: Rounding = math.ceil,
    multiple_of: int = 1,
    minimum: int = 0,
    priority: Priority = by_position,
    reweigh: Reweigh = as_chosen,
    stacked: Stacked = HERE,
) -> Backend:
    """Backend in which every expert has `slots` slots, or `factor` times an even share of choices.

    `priority` says who takes the slots, `reweigh` what the choices that are left then weigh,
    `stacked` where the experts are. A token whose choices were all dropped gets 0. The output says
    how many choices were dropped.
    Raises UserError for less than one slot, and, when applied, for a symbolic number of tokens.
    """
    if slots is not None and slots < 1:
        raise UserError(f"Expert capacity is {slots} slots: give every expert at least one.")

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        if not isinstance(n, int):
            raise UserError(
                "Expert capacity needs a fixed number of tokens: export with a fixed batch size or "
                "with a dropless backend (auto, blocks)."
            )
        if n == 0:
            # Before slots are counted: a share of no tokens is no slot, which is an error.
            return Applied(nothing(fn, params, x_ND), jnp.zeros((), jnp.int32))
        experts = stacked.count(params)
        c = slots or expert_capacity(n * k, experts, factor, rounding, multiple_of, minimum)
        plan = capacity_slots(routing, experts, c, priority)
        x_ECD = spread(x_ND, plan).reshape(experts, c, -1)
        # Empty slots go through the experts, too: shapes are static, and `combine` ignores them.
        y_ECD = stacked.apply(fn, params, x_ECD)
        weights_NK = reweigh(routing.weights_NK, plan.slot_NK >= 0)
        y_ND = combine(y_ECD.reshape(experts * c, -1), weights_NK, plan)
        dropped = jnp.sum((routing.experts_NK >= 0) & (plan.slot_NK < 0), dtype=jnp.int32)
        return Applied(y_ND.astype(x_ND.dtype), dropped)

    return apply
