"""A matrix split at random into as many disjoint parts as there are experts (MoSA).

Zhang et al., "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", arXiv:2312.02923.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def owners(score: Array, experts: int) -> Array:
    """For every entry the expert that owns it, int32 of the scores' shape.

    Expert e owns the entries from the e/E to the (e + 1)/E quantile of the scores: the parts are
    disjoint, cover everything and are equal but for the rounding of the published code, which is
    followed: two sizes differ by 2 entries at most.
    """
    # As published, with a rounded 1 / E: where E divides the entries a part may miss its last one.
    share = 1.0 / experts
    ends = jnp.asarray([int(share * e * score.size) for e in range(1, experts)], jnp.int32)
    rank = jnp.argsort(jnp.argsort(score.reshape(-1)))
    return jnp.searchsorted(ends, rank, side="right").astype(jnp.int32).reshape(score.shape)


def masks(owner: Array, experts: int) -> Array:
    """bool [E, ...]: the entries of each expert."""
    numbers = jnp.arange(experts).reshape(-1, *(1,) * owner.ndim)
    return owner[None] == numbers


def random_owners(key: Array, shape: tuple[int, ...], experts: int) -> Array:
    """`owners` of uniform scores."""
    return owners(jax.random.uniform(key, shape), experts)


def part(start: Array, moved: Array, owner: Array, expert: Array | int) -> Array:
    """The matrix of one expert: `moved` where it owns, elsewhere what all began with.

    The gradient with respect to `moved` is 0 outside of the expert's entries.
    """
    return jnp.where(owner == expert, moved, start)


def merged(start: Array, moved: Array, share: float) -> Array:
    """start + share * (moved - start): with 1/E the mean of all experts, with 1 their union."""
    return start + share * (moved - start)
