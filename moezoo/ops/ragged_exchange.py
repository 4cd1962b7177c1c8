"""Sharded experts with `ragged_all_to_all`: only rows that exist travel, into a bounded buffer."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.dispatch import Slots, at, combine, sort_by_expert, sorted_slots, spread
from moezoo.ops.expert import Applied, Backend, ExpertFn, Params, count_experts
from moezoo.ops.routing import Routing
from moezoo.ops.visits import (
    EXPERT,
    Choices,
    as_routing,
    at_most,
    count,
    listed,
    own_choices,
    share_of_tokens,
    visits,
)


class Trip(NamedTuple):
    """What one device sends to and gets from each of the P devices, int32 [P] each.

    from_P: first row of what goes to each; send_P: how many rows; to_P: where they begin at the
    receiver; receive_P: how many rows come from each.
    """

    from_P: Array
    send_P: Array
    to_P: Array
    receive_P: Array


class Journey(NamedTuple):
    """A trip and the trip back."""

    there: Trip
    back: Trip


def plan_journey(sizes_P: Array, rows: int) -> Journey:
    """This device wants to send `sizes_P` rows to each; every device has room for `rows`.

    Devices fill a receiver's room in order; what does not fit any more stays at home.
    """
    me = lax.axis_index(EXPERT)
    wanted_PP = lax.all_gather(sizes_P, EXPERT)  # [sender, receiver]
    from_PP = jnp.cumsum(wanted_PP, axis=1) - wanted_PP
    to_PP = jnp.minimum(jnp.cumsum(wanted_PP, axis=0) - wanted_PP, rows)
    sent_PP = jnp.minimum(wanted_PP, rows - to_PP)
    there = Trip(from_PP[me], sent_PP[me], to_PP[me], sent_PP[:, me])
    return Journey(there, Trip(to_PP[:, me], sent_PP[:, me], from_PP[:, me], sent_PP[me]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def travel(rows: int, x_SD: Array, journey: Journey) -> Array:
    """The rows that arrive, [rows, D]; rows that nobody sends are 0."""
    room = jnp.zeros((rows, *x_SD.shape[1:]), x_SD.dtype)
    return lax.ragged_all_to_all(x_SD, room, *journey.there, axis_name=EXPERT)


def _travel_forward(rows: int, x_SD: Array, journey: Journey):
    return travel(rows, x_SD, journey), (x_SD, journey)


def _travel_backward(rows: int, saved, dy: Array):
    x_SD, journey = saved
    return travel(x_SD.shape[0], dy, Journey(journey.back, journey.there)), None


travel.defvjp(_travel_forward, _travel_backward)


def ragged_exchanged(local: Backend, factor: float, rows: int | None) -> Backend:
    """Inside a `shard_map`: tokens to the devices of their experts and sums back, as they are.

    A token is sent once to each device that it visits. A device takes `rows` visits, or `factor`
    times an even share; what comes beyond that is dropped, from the last devices first, and
    counted. With rows = P * N nothing can be dropped.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        size, devices = count_experts(params), lax.axis_size(EXPERT)
        limit = _limit(n, k, size, devices, factor, rows)
        leaving = sort_by_expert(visits(routing.experts_NK, size), devices)
        plan = _cut(sorted_slots(leaving, k), n * min(k, devices))
        journey = plan_journey(leaving.end_E - leaving.start_E, limit.visits)
        wanted = own_choices(routing, size)
        arrived = _arrived(wanted, limit.visits)
        x_RD: Array = travel(limit.visits, spread(x_ND, plan), journey)  # type: ignore[assignment]
        here = at_most(local, limit.choices)
        y_RD, dropped = here(fn, params, x_RD, as_routing(arrived, size))
        y_SD: Array = travel(  # type: ignore[assignment]
            plan.choice_S.shape[0], y_RD, Journey(journey.back, journey.there)
        )
        # Rows that found no room come back as 0, which is what they contribute.
        y_ND = combine(y_SD, jnp.ones((n, k), jnp.float32), plan)
        lost = count(wanted.experts_NK) - count(arrived.experts_NK)
        return Applied(y_ND.astype(x_ND.dtype), dropped + lost)

    return apply


def _arrived(wanted: Choices, rows: int) -> Choices:
    """The choices of each row that arrives: visitors in order of their device, then of token.

    Every device knows all choices of its group, which are few bytes next to the tokens: rows of a
    few numbers would be padded to a TPU's 128 lanes on their way.
    """
    plan = listed(jnp.where(jnp.any(wanted.experts_NK >= 0, axis=1), 0, -1)[:, None], rows)
    token_S = jnp.maximum(plan.choice_S, 0)
    experts_SK = jnp.where((plan.choice_S >= 0)[:, None], at(wanted.experts_NK, token_S), -1)
    return Choices(experts_SK, spread(wanted.weights_NK, plan))


class _Limit(NamedTuple):
    visits: int
    choices: int


def _limit(n: int, k: int, size: int, devices: int, factor: float, rows: int | None) -> _Limit:
    most = devices * n
    if rows is not None:
        return _Limit(min(rows, most), min(rows, most) * min(k, size))
    share = devices * n * share_of_tokens(k, size * devices, devices)
    taken = min(most, math.ceil(factor * share))
    return _Limit(taken, min(taken * min(k, size), math.ceil(factor * n * k)))


def _cut(plan: Slots, rows: int) -> Slots:
    """Without the rows at the end that are never filled."""
    return plan._replace(choice_S=plan.choice_S[:rows])
