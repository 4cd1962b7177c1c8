"""Parts of a batch that are routed by themselves: groups of tokens, and members of an ensemble.

A group of consecutive tokens has its own capacity and its own losses: V-MoE routes the tokens of
one device or one image as a group (arXiv:2106.05974, section 2).

In an ensemble the experts are divided among members, and so are the tokens. Efficient ensemble of
experts, E3 (Allingham et al., arXiv:2110.03360): a batch is repeated once per member, and token n
belongs to member n mod M, which has its own block of E/M experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError
from moezoo.ops.expert import Applied, Backend, ExpertFn, Params
from moezoo.ops.routing import Routing, expert_range, map_rows


def count_groups(tokens: int, size: int) -> int:
    """G. Raises UserError where `tokens` do not fill whole groups of `size`."""
    if size < 1 or tokens % size:
        raise UserError(
            f"{tokens} tokens do not divide into groups of {size}: choose a divisor (group size)."
        )
    return tokens // size


def group_of_rows(tokens: int, row: int, rows: int) -> int:
    """Tokens of a group of `rows` batch rows of `row` tokens each.

    Where the rows do not fill whole groups, a group has as many rows as divide both. Raises
    UserError where the tokens are no whole rows.
    """
    return row * math.gcd(count_groups(tokens, row), rows)


def into_groups(routing: Routing, size: int) -> Routing:
    """The decision with a leading axis of groups, [G, size, ...] in every field."""
    n = routing.mask_N.shape[0]
    groups = count_groups(n, size)
    return map_rows(lambda a: a.reshape(groups, size, *a.shape[1:]), routing)


def out_of_groups(routing: Routing) -> Routing:
    """Inverse of `into_groups`."""
    return map_rows(lambda a: a.reshape(-1, *a.shape[2:]), routing)


def in_groups(route: Callable[..., Routing], size: int) -> Callable[..., Routing]:
    """`route` of each group by itself: arrays [N, ...] in, the decision of all N tokens out."""

    def routed(*arrays_N: Array) -> Routing:
        groups = count_groups(arrays_N[0].shape[0], size)
        grouped = (a.reshape(groups, size, *a.shape[1:]) for a in arrays_N)
        return out_of_groups(jax.vmap(route)(*grouped))

    return routed


def per_group(backend: Backend, size: int) -> Backend:
    """`backend` on each group of `size` tokens by itself, which matters where it may drop."""

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, d = x_ND.shape
        if n == 0:
            return backend(fn, params, x_ND, routing)
        x_GND = x_ND.reshape(count_groups(n, size), size, d)

        def of_group(x_ND: Array, routing: Routing) -> Applied:
            return backend(fn, params, x_ND, routing)

        y_GND, dropped_G = jax.vmap(of_group)(x_GND, into_groups(routing, size))
        # Experts may give rows of another width.
        return Applied(y_GND.reshape(n, *y_GND.shape[2:]), jnp.sum(dropped_G, dtype=jnp.int32))

    return apply


def per_group_of_rows(backend: Backend, row: int, rows: int) -> Backend:
    """`per_group` with groups of `group_of_rows`."""

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        if x_ND.shape[0] == 0:
            return backend(fn, params, x_ND, routing)
        # At the time of the call: another batch may fill other groups.
        size = group_of_rows(x_ND.shape[0], row, rows)
        return per_group(backend, size)(fn, params, x_ND, routing)

    return apply


def mean_over_groups(loss: Callable[[Routing], Array], size: int) -> Callable[[Routing], Array]:
    """The mean of the groups' losses; 0 for no group."""

    def mean(routing: Routing) -> Array:
        if routing.mask_N.shape[0] == 0:
            return jnp.zeros((), jnp.float32)
        return jnp.mean(jax.vmap(loss)(into_groups(routing, size)))

    return mean


def check_members(experts: int, members: int, k: int) -> None:
    """Raises UserError unless every member has the same number of experts, at least k."""
    if members < 1 or experts % members or not 1 <= k <= experts // members:
        raise UserError(
            f"{experts} experts cannot be divided among {members} members that choose {k} each: "
            "members must divide experts into blocks of at least k."
        )


def member_support(tokens: int, experts: int, members: int) -> Array:
    """The experts that each token may choose from, bool [N, E]: its member's block."""
    block = experts // members
    member_N = jnp.arange(tokens, dtype=jnp.int32) % members
    return expert_range(member_N * block, block, experts)


def by_member(routing: Routing, members: int) -> Routing:
    """Each member's decision among its own experts, [M, N/M, ...] in every field; for losses."""
    n, e = routing.logits_NE.shape
    if n % members:
        raise UserError(f"{n} tokens cannot be divided among {members} members of an ensemble.")
    block = e // members
    own = jnp.arange(members)

    def tokens(a_N: Array) -> Array:
        return jnp.moveaxis(a_N.reshape(n // members, members, *a_N.shape[1:]), 1, 0)

    def experts(a_NE: Array) -> Array:
        # [.., member of the token, member of the expert, ..]: off the diagonal nothing is allowed.
        blocks = a_NE.reshape(n // members, members, members, block)
        return jnp.moveaxis(blocks[:, own, own], 1, 0)

    first_M11 = (own * block)[:, None, None]
    experts_MNK = tokens(routing.experts_NK)
    return Routing(
        experts_NK=jnp.where(experts_MNK < 0, -1, experts_MNK - first_M11),
        weights_NK=tokens(routing.weights_NK),
        probs_NE=experts(routing.probs_NE),
        logits_NE=experts(routing.logits_NE),
        noisy_NE=experts(routing.noisy_NE),
        noise_scale_NE=experts(routing.noise_scale_NE),
        mask_N=tokens(routing.mask_N),
        lot_NK=None if routing.lot_NK is None else tokens(routing.lot_NK),
    )
