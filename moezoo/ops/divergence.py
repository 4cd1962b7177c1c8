"""How far two predictions are apart as distributions, and what is to be done about it.

What a network gives stands for a distribution: logits of classes for a categorical one, one logit
for a Bernoulli, a number for a Gaussian of variance 1. Divergences are means over everything but
the classes, in nats, float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

Divergence = Callable[[Array, Array], Array]
# (divergence, first, second) -> scalar loss
Agreement = Callable[[Divergence, Array, Array], Array]


def categorical(p: Array, q: Array) -> Array:
    """KL(p || q) of softmaxes over the last axis, the mean over the others."""
    log_p, log_q = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (p, q))
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1).mean()


def bernoulli(p: Array, q: Array) -> Array:
    """KL(p || q) of sigmoids, the mean over all logits."""
    p, q = p.astype(jnp.float32), q.astype(jnp.float32)
    yes = jax.nn.sigmoid(p) * (jax.nn.log_sigmoid(p) - jax.nn.log_sigmoid(q))
    no = jax.nn.sigmoid(-p) * (jax.nn.log_sigmoid(-p) - jax.nn.log_sigmoid(-q))
    return (yes + no).mean()


def gaussian(p: Array, q: Array) -> Array:
    """KL(p || q) of Gaussians of variance 1 around these means: half the squared difference."""
    return 0.5 * jnp.square(p.astype(jnp.float32) - q.astype(jnp.float32)).mean()


def symmetric(divergence: Divergence, first: Array, second: Array) -> Array:
    """(KL(second || first) + KL(first || second)) / 2; each learns with the other held still.

    As in MoSA's code, whose targets are detached: the value is the symmetric divergence's, the
    gradient is not quite.
    """
    return 0.5 * (towards(divergence, first, second) + towards(divergence, second, first))


def towards(divergence: Divergence, first: Array, second: Array) -> Array:
    """KL(second || first), from which the second learns nothing (distillation)."""
    return divergence(lax.stop_gradient(second), first)
