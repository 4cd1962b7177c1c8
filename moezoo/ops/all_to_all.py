"""Sharded experts with buffers of fixed size: every device sends every other one as many rows."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.capacity import HERE, Priority, Stacked, capacity_slots
from moezoo.ops.dispatch import combine, spread
from moezoo.ops.expert import Applied, Backend, ExpertFn, Params, count_experts
from moezoo.ops.routing import Routing
from moezoo.ops.visits import (
    EXPERT,
    Choices,
    as_routing,
    at_most,
    choices_of_slots,
    count,
    room,
    visits,
)


def exchanged(local: Backend, factor: float, slots: int | None, priority: Priority) -> Backend:
    """Inside a `shard_map`: tokens to the devices of their experts and sums back, by all_to_all.

    A token is sent once to each device that it visits. `slots` tokens go from one device to
    another, or `factor` times an even share; a token that finds no slot there loses its choices
    on that device. First choices take slots before second ones, tokens in order of `priority`.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        size, devices = count_experts(params), lax.axis_size(EXPERT)
        limit = room(n, k, size * devices, devices, factor, slots)
        visit = routing._replace(experts_NK=visits(routing.experts_NK, size))
        plan = capacity_slots(visit, devices, limit.tokens, priority)
        device_S = jnp.repeat(jnp.arange(devices, dtype=jnp.int32), limit.tokens)
        with_token = choices_of_slots(routing, plan, device_S, size)
        swap = partial(lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=0, tiled=True)
        arrived = as_routing(Choices(*map(swap, with_token)), size)
        here = at_most(local, limit.choices)
        y_SD, dropped = here(fn, params, swap(spread(x_ND, plan)), arrived)
        y_ND = combine(swap(y_SD), jnp.ones((n, k), jnp.float32), plan)
        lost = count(routing.experts_NK) - count(with_token.experts_NK)
        return Applied(y_ND.astype(x_ND.dtype), dropped + lost)

    return apply


def _count(params: Params) -> int:
    return count_experts(params) * lax.axis_size(EXPERT)


def _apply(fn: ExpertFn, params: Params, x_ECD: Array) -> Array:
    swap = partial(lax.all_to_all, axis_name=EXPERT, tiled=True)
    x_ECD = swap(x_ECD, split_axis=0, concat_axis=1)  # own experts, slots of all devices
    y_ECD = HERE.apply(fn, params, x_ECD)
    return swap(y_ECD, split_axis=1, concat_axis=0)


# The experts of a whole expert axis: slots go to the devices of their experts and back.
ACROSS = Stacked(_count, _apply)
