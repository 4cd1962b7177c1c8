"""Padding and packing: which token sees which, and where in its document each one stands."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def visible(mask_BT: Array | None, segments_BT: Array | None, batch: int, tokens: int) -> Array:
    """Which tokens (last axis) each token sees: itself and those before it; bool [B, T, T].

    mask_BT: bool, False = padding, which nobody sees. segments_BT: int, documents packed into one
    row; tokens see their own document only.
    """
    seen_BTT = jnp.broadcast_to(jnp.tri(tokens, dtype=bool), (batch, tokens, tokens))
    if mask_BT is not None:
        seen_BTT &= mask_BT[:, None, :]
    if segments_BT is not None:
        seen_BTT &= segments_BT[:, :, None] == segments_BT[:, None, :]
    return seen_BTT


def positions(
    mask_BT: Array, segments_BT: Array | None = None, before_B: Array | None = None
) -> Array:
    """The number of tokens before each one in its document, int32 [B, T]; 0 for padding in front.

    before_B: tokens of the row that earlier calls have seen.
    """
    count_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1
    if segments_BT is not None:
        fresh_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
        # What the count was where the current segment began; counts never decrease.
        count_BT -= jax.lax.cummax(jnp.where(fresh_BT, count_BT, 0), axis=1)
    if before_B is not None:
        count_BT += before_B[:, None]
    return jnp.maximum(count_BT, 0)
