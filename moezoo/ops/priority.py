"""Who takes a slot first where experts have room for a fixed number of choices."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

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
    return jnp.argsort(-values, stable=True).astype(jnp.int32)


def _rank_by_rank(token_N: Array, routing: Routing) -> Array:
    k = routing.experts_NK.shape[1]
    return (token_N[:, None] * k + jnp.arange(k)).T.reshape(-1).astype(jnp.int32)
