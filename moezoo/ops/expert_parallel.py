"""Tokens that visit the devices that hold their experts: who goes where, and what is done there.

A token visits a device once, however many of its experts live there: it travels with the list of
its experts of that device and their weights, and one weighted sum travels back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moezoo.errors import UserError
from moezoo.ops.dispatch import Slots, at, combine, spread
from moezoo.ops.expert import Applied, Backend, ExpertFn, Params, count_experts
from moezoo.ops.routing import Routing

EXPERT = "expert"  # the mesh axis over which experts are split


class Choices(NamedTuple):
    """Experts of one device, numbered from 0, and their weights.

    experts_NK: int32, -1 = no expert of this device. weights_NK: float32, 0 there.
    """

    experts_NK: Array
    weights_NK: Array


def choices_of_device(experts_NK: Array, weights_NK: Array, first: Array, size: int) -> Choices:
    """The choices among the `size` experts from `first` on, in min(K, size) columns.

    `first` is a scalar, or [N, 1] where every row asks about another device.
    """
    experts_NK = experts_NK - first
    own_NK = (experts_NK >= 0) & (experts_NK < size)
    experts_NK, weights_NK = jnp.where(own_NK, experts_NK, -1), jnp.where(own_NK, weights_NK, 0.0)
    if experts_NK.shape[1] <= size:
        return Choices(experts_NK, weights_NK)
    # Fewer experts than choices: one column per expert; comparisons, so derivatives are too.
    chosen_NKE = experts_NK[..., None] == jnp.arange(size)
    weights_NE = jnp.sum(jnp.where(chosen_NKE, weights_NK[..., None], 0.0), axis=1)
    index_E = jnp.arange(size, dtype=experts_NK.dtype)
    return Choices(jnp.where(jnp.any(chosen_NKE, axis=1), index_E, -1), weights_NE)


def own_choices(routing: Routing, size: int) -> Choices:
    """The choices of all tokens of the expert group among this device's `size` experts, [P*N, K].

    Inside a `shard_map`; rows in order of device.
    """
    experts_MK, weights_MK = (
        lax.all_gather(a, EXPERT, tiled=True) for a in (routing.experts_NK, routing.weights_NK)
    )
    return choices_of_device(experts_MK, weights_MK, lax.axis_index(EXPERT) * size, size)


def as_routing(choices: Choices, experts: int) -> Routing:
    """What a backend reads of a routing; its probabilities and logits are 0."""
    zeros_NE = jnp.zeros((choices.experts_NK.shape[0], experts), jnp.float32)
    mask_N = jnp.any(choices.experts_NK >= 0, axis=1)
    return Routing(*choices, zeros_NE, zeros_NE, zeros_NE, zeros_NE, mask_N)


def arrivals(experts_NK: Array, size: int) -> Array:
    """The device of each choice, int32 [N, K]; -1 where an earlier choice goes there already."""
    device_NK = jnp.where(experts_NK < 0, -1, experts_NK // size)
    columns = [device_NK[:, 0]]
    for rank in range(1, device_NK.shape[1]):
        device_N = device_NK[:, rank]
        again_N = jnp.any(device_NK[:, :rank] == device_N[:, None], axis=1)
        columns.append(jnp.where(again_N, -1, device_N))
    return jnp.stack(columns, axis=1)


def choices_of_slots(routing: Routing, plan: Slots, device_S: Array, size: int) -> Choices:
    """What travels with the token in each slot to `device_S`, [S, min(K, size)]."""
    token_S = jnp.maximum(plan.choice_S, 0) // routing.experts_NK.shape[1]
    filled_S1 = (plan.choice_S >= 0)[:, None]
    experts_SK = jnp.where(filled_S1, at(routing.experts_NK, token_S), -1)
    # By `spread`: weights have a derivative, which experts' numbers have not.
    weights_SK = spread(routing.weights_NK, plan)
    return choices_of_device(experts_SK, weights_SK, (device_S * size)[:, None], size)


def count(experts_NK: Array) -> Array:
    """The number of choices, int32."""
    return jnp.sum(experts_NK >= 0, dtype=jnp.int32)


def at_most(backend: Backend, rows: int) -> Backend:
    """`backend` on a list of at most `rows` choices instead of tokens times K.

    Most tokens of a receiving device have fewer than K experts there, and static shapes would pay
    for all of them. Choices beyond `rows` are dropped, last ones first, and counted.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        if rows >= n * k:
            return backend(fn, params, x_ND, routing)
        plan = listed(routing.experts_NK, rows)
        # A listed choice weighs 1 here; its weight comes at the end, in `combine`.
        listed_S = plan.choice_S >= 0
        expert_S = at(routing.experts_NK.reshape(-1), jnp.maximum(plan.choice_S, 0))
        single = Choices(
            jnp.where(listed_S, expert_S, -1)[:, None], listed_S[:, None].astype(jnp.float32)
        )
        own = as_routing(single, count_experts(params))
        y_SD, dropped = backend(fn, params, spread(x_ND, plan), own)
        y_ND = combine(y_SD, routing.weights_NK, plan).astype(x_ND.dtype)
        return Applied(y_ND, dropped + count(routing.experts_NK) - jnp.sum(listed_S))

    return apply


def listed(experts_NK: Array, rows: int) -> Slots:
    """One slot per choice in ascending order, without gaps; S = `rows`."""
    chosen = (experts_NK >= 0).reshape(-1)
    row = jnp.cumsum(chosen, dtype=jnp.int32) - 1
    slot = jnp.where(chosen & (row < rows), row, -1)
    choice = jnp.arange(slot.shape[0], dtype=jnp.int32)
    to = jnp.where(slot < 0, rows + choice, slot)  # outside the list, and all different
    choice_S = jnp.full((rows,), -1, jnp.int32)
    choice_S = choice_S.at[to].set(choice, mode="drop", unique_indices=True)
    return Slots(choice_S, slot.reshape(experts_NK.shape))


class ExchangeSizes(NamedTuple):
    """Static sizes: `tokens` from one device to another, `choices` on one device altogether."""

    tokens: int
    choices: int


def share_of_tokens(k: int, experts: int, devices: int) -> float:
    """The share of tokens that visit a given device when all sets of K experts are as likely."""
    others = experts - experts // devices
    return 1.0 - math.comb(others, k) / math.comb(experts, k)


def room(
    n: int, k: int, experts: int, devices: int, factor: float, slots: int | None
) -> ExchangeSizes:
    """`factor` times what an even load needs of `n` tokens per device, or exactly `slots`."""
    per_token = min(k, experts // devices)
    if slots is not None:
        tokens = min(slots, n)
        return ExchangeSizes(tokens, devices * tokens * per_token)
    tokens = min(n, math.ceil(factor * n * share_of_tokens(k, experts, devices)))
    return ExchangeSizes(tokens, min(devices * tokens * per_token, math.ceil(factor * n * k)))


def check_room(factor: float, slots: int | None) -> None:
    """UserError where nothing could travel."""
    if not factor > 0:
        raise UserError(f"The exchange's capacity factor is {factor}; it must be above 0.")
    if slots is not None and slots < 1:
        raise UserError(f"The exchange has {slots} slots per device; it needs at least one.")
