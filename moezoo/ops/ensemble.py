"""Ensembles inside one MoE layer: the experts are divided among members, and so are the tokens.

Efficient ensemble of experts, E3 (Allingham et al., arXiv:2110.03360): a batch is repeated once per
member, and token n belongs to member n mod M, whose own block of E/M experts it chooses from.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError
from moezoo.ops.routing import Routing, expert_range


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
        wide_NE = jnp.broadcast_to(a_NE, (n, e))
        blocks = wide_NE.reshape(n // members, members, members, block)
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
