"""Which tokens a sub-layer computes: a hard choice with a gradient, its budget, and the saving.

Zhao et al., "Dynamic Tuning Towards Parameter and Inference Efficiency for ViT Adaptation" (DyT),
NeurIPS 2024, arXiv:2403.11808, section 3.2, and the published code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class TokenChoice(NamedTuple):
    """keep_BT: float32, 1 = computed and 0 = skipped, with the gradient of a soft choice.

    logits_BT: float32, clean. soft_BT: the probability that was rounded.
    """

    keep_BT: Array
    logits_BT: Array
    soft_BT: Array


def kept(logits_BT: Array, noise_BT: Array | None = None, temperature: float = 1.0) -> TokenChoice:
    """Tokens whose sigmoid((logit + noise) / temperature) exceeds 1/2, straight through.

    noise_BT: the difference of two Gumbel draws in training; none: the sign of the logit decides,
    whatever the temperature.
    """
    logits_BT = logits_BT.astype(jnp.float32)
    noisy_BT = logits_BT if noise_BT is None else logits_BT + noise_BT
    soft_BT = jax.nn.sigmoid(noisy_BT / temperature)
    hard_BT = (soft_BT > 0.5).astype(jnp.float32)
    # The value is the hard choice, the derivative the soft one's.
    return TokenChoice(hard_BT + (soft_BT - lax.stop_gradient(soft_BT)), logits_BT, soft_BT)


def logistic(key: Array, shape: tuple[int, ...]) -> Array:
    """The difference of two Gumbel draws."""
    return jax.random.logistic(key, shape, jnp.float32)


def always(kept: TokenChoice, free_T: Array) -> TokenChoice:
    """The same where `free_T`, bool [T], is True; every other token is computed."""
    keep_BT = jnp.where(free_T, kept.keep_BT, 1.0)
    return kept._replace(keep_BT=keep_BT, soft_BT=jnp.where(free_T, kept.soft_BT, 1.0))


def budget_loss(
    keep_BLT: Array, *, target: float, weight: float, least: float = 0.0, least_weight: float = 1.0
) -> Array:
    """weight * ((mean share kept - target)^2 + what layers of single images keep below `least`).

    keep_BLT: of B images, L layers and the T tokens that may be skipped. The second term is summed
    over images and layers, as published.
    """
    share = keep_BLT.mean()
    below = jnp.maximum(least - keep_BLT.mean(-1), 0.0).sum()
    return weight * (jnp.square(share - target) + least_weight * below)


def places(tokens: int, share: float) -> int:
    """Rows with room for this share of an image's tokens, at least one."""
    return max(1, min(tokens, -int(-tokens * share // 1)))


def on_kept(layer: Callable[[Array], Array], x_BTD: Array, kept: TokenChoice, room: int) -> Array:
    """layer(x) of tokens that are kept, 0 elsewhere; the layer runs on `room` tokens of an image.

    layer: of each token by itself. Where an image keeps more tokens than there is room for, those
    of the smallest logits are skipped; where it never does this is keep * layer(x).
    """
    taken_BT = kept.keep_BT > 0.5
    # Tokens that are always computed come first, whatever their logits.
    certain_BT = jnp.where(kept.soft_BT >= 1.0, jnp.inf, kept.logits_BT)
    order_BT = jnp.argsort(jnp.where(taken_BT, -certain_BT, jnp.inf), axis=-1)
    rank_BT = jnp.argsort(order_BT, axis=-1)
    given_BCD = jnp.take_along_axis(x_BTD, order_BT[:, :room, None], axis=1)
    y_BCD = layer(given_BCD)
    slot_BT = jnp.minimum(rank_BT, room - 1)
    y_BTD = jnp.take_along_axis(y_BCD, slot_BT[..., None], axis=1)
    there_BT = taken_BT & (rank_BT < room)
    return jnp.where(there_BT[..., None], y_BTD, jnp.zeros((), y_BTD.dtype))
