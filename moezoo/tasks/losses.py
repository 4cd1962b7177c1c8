"""Losses that several tasks share: float32, 0 with zero gradient if no pixel is labelled."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moezoo.tasks.base import leaves_out_marked, mark_of, only_rows


def labelled(label_BHW: jax.Array, valid_B: jax.Array | None = None) -> jax.Array:
    """Pixels of a class or binary map that carry a label: not 255, and in a real row.

    In 16-bit maps, which have more classes, 65535 marks pixels without a label.
    """
    return only_rows(label_BHW != mark_of(label_BHW.dtype), valid_B)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the entries under the mask (broadcast to the values); 0 if there are none."""
    mask = jnp.broadcast_to(mask, values.shape)
    total = jnp.sum(jnp.where(mask, values, 0.0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(mask, dtype=jnp.float32), 1.0)


def negative_log_likelihood(logits_BHWC: jax.Array, label_BHW: jax.Array) -> jax.Array:
    """-log softmax of the labelled class, float32 [B,H,W]; a label outside the classes selects 0.

    The class is selected by comparison, so that the derivative is not a scatter.
    """
    logits = logits_BHWC.astype(jnp.float32)
    chosen = label_BHW[..., None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(logits, -1) - jnp.sum(jnp.where(chosen, logits, 0.0), -1)


@leaves_out_marked
def cross_entropy(
    logits_BHWC: jax.Array, label_BHW: jax.Array, valid_B: jax.Array | None = None
) -> jax.Array:
    """Softmax cross-entropy, mean over the labelled pixels of the batch (M3ViT, TaskPrompter)."""
    mask = labelled(label_BHW, valid_B)
    return masked_mean(negative_log_likelihood(logits_BHWC, label_BHW), mask)


@leaves_out_marked
def class_balanced_cross_entropy(
    logits_BHWC: jax.Array,
    label_BHW: jax.Array,
    valid_B: jax.Array | None = None,
    *,
    exponent: float,
) -> jax.Array:
    """Cross-entropy with classes weighted by (share of the batch's labelled pixels)^-exponent.

    A weighted mean, so it is as large as `cross_entropy`, which is the case of exponent 0; with 1,
    every class that occurs counts the same. For rare classes in indoor scenes: Eigen and Fergus
    (arXiv:1411.4734, section 3.3).
    """
    mask = labelled(label_BHW, valid_B)
    classes = jnp.arange(logits_BHWC.shape[-1])
    hot_BHWC = (label_BHW[..., None] == classes) & mask[..., None]
    count_C = jnp.sum(hot_BHWC, axis=(0, 1, 2), dtype=jnp.float32)
    share_C = jnp.maximum(count_C, 1.0) / jnp.maximum(jnp.sum(count_C), 1.0)
    weight_BHW = jnp.sum(jnp.where(hot_BHWC, share_C**-exponent, 0.0), axis=-1)
    total = jnp.sum(weight_BHW * negative_log_likelihood(logits_BHWC, label_BHW))
    return total / jnp.maximum(jnp.sum(weight_BHW), 1e-9)


def negative_share(target: jax.Array, mask: jax.Array) -> jax.Array:
    """Share of labelled pixels of the batch that are negative, the weight of the positives."""
    return masked_mean(1.0 - target, mask)


@leaves_out_marked
def balanced_cross_entropy(
    logits_BHWC: jax.Array, label_BHW: jax.Array, valid_B: jax.Array | None = None
) -> jax.Array:
    """Two-logit cross-entropy with class 1 weighted by the share of class 0 and vice versa.

    Divided by the number of labelled pixels, not by the sum of weights (TaskPrompter, InvPT).
    """
    mask = labelled(label_BHW, valid_B)
    target = (label_BHW == 1).astype(jnp.float32)
    share = negative_share(target, mask)
    weight = jnp.where(target > 0, share, 1.0 - share)
    return masked_mean(weight * negative_log_likelihood(logits_BHWC, label_BHW), mask)


@leaves_out_marked
def weighted_binary(
    logits: jax.Array, target: jax.Array, mask: jax.Array, positive_weight: jax.Array | float
) -> jax.Array:
    """w*y*softplus(-x) + (1-w)*(1-y)*softplus(x), mean over the mask; all arrays of one shape."""
    x = logits.astype(jnp.float32)
    positive = positive_weight * target * jax.nn.softplus(-x)
    negative = (1.0 - positive_weight) * (1.0 - target) * jax.nn.softplus(x)
    return masked_mean(positive + negative, mask)


@leaves_out_marked
def fixed_binary(
    logits_BHWC: jax.Array,
    label_BHW: jax.Array,
    valid_B: jax.Array | None = None,
    *,
    positive_weight: float,
) -> jax.Array:
    """One-logit cross-entropy with a fixed weight for positives (edges: 0.95)."""
    target = (label_BHW == 1).astype(jnp.float32)
    return weighted_binary(
        logits_BHWC[..., 0], target, labelled(label_BHW, valid_B), positive_weight
    )


@leaves_out_marked
def balanced_binary(
    logits_BHWC: jax.Array, label_BHW: jax.Array, valid_B: jax.Array | None = None
) -> jax.Array:
    """One-logit cross-entropy, positives weighted by the share of negatives in the batch.

    M3ViT's saliency loss and the edge loss of HED; 0 with zero gradient without any positive.
    """
    mask = labelled(label_BHW, valid_B)
    target = (label_BHW == 1).astype(jnp.float32)
    return weighted_binary(logits_BHWC[..., 0], target, mask, negative_share(target, mask))


def learned_total(losses_J: jax.Array, sigma_J: jax.Array) -> jax.Array:
    """Sum over the tasks of 0.5 / sigma^2 * loss + log(1 + sigma^2); sigma is trained too.

    Liebel and Koerner (arXiv:1805.06334), as in Mod-Squad's code (which also clips each loss to
    +-1000).
    """
    variance_J = jnp.square(sigma_J)
    return jnp.sum(0.5 / variance_J * losses_J + jnp.log1p(variance_J))


def weighted_total(
    losses: Mapping[str, jax.Array], weights: Mapping[str, float]
) -> jax.Array | float:
    """Sum over the tasks of weight times loss (M3ViT section 4.1, TaskPrompter section 4)."""
    return sum(weights[name] * value for name, value in losses.items())
