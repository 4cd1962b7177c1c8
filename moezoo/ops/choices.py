"""Every choice of a token by itself: experts whose outputs are not added up at once.

Attention experts need this (one routing, two products, attention between them), and so do
statistics of single experts. A choice becomes a token of its own with one expert, so any backend
does it, on one device or many. The work is that of a layer with the same choices. Backends with
capacity see choices of rank 0 only: earlier tokens take slots before later ones, all their choices
alike.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from moezoo.ops.expert import Applied, Backend, ExpertFn, Params
from moezoo.ops.routing import Routing


def one_each(routing: Routing) -> Routing:
    """The N*K choices as tokens that chose one expert with weight 1; row token * K + rank."""
    n, k = routing.experts_NK.shape
    scale_NE, lot_NK = routing.noise_scale_NE, routing.lot_NK
    experts_R1 = routing.experts_NK.reshape(n * k, 1)
    return Routing(
        experts_NK=experts_R1,
        weights_NK=(experts_R1 >= 0).astype(jnp.float32),
        probs_NE=jnp.repeat(routing.probs_NE, k, axis=0),
        logits_NE=jnp.repeat(routing.logits_NE, k, axis=0),
        noisy_NE=jnp.repeat(routing.noisy_NE, k, axis=0),
        noise_scale_NE=scale_NE if scale_NE.shape[0] == 1 else jnp.repeat(scale_NE, k, axis=0),
        mask_N=jnp.repeat(routing.mask_N, k),
        lot_NK=None if lot_NK is None else lot_NK.reshape(n * k, 1),
    )


def each_choice(
    apply: Backend, fn: ExpertFn, params: Params, x_ND: Array, routing: Routing
) -> Applied:
    """What each chosen expert makes of its token, before the weight: y [N, K, F].

    0 where a choice went nowhere. Experts may change the width.
    """
    n, k = routing.experts_NK.shape
    x_NKD = jnp.broadcast_to(x_ND[:, None], (n, k, x_ND.shape[1]))
    return each_input(apply, fn, params, x_NKD, routing)


def each_input(
    apply: Backend, fn: ExpertFn, params: Params, x_NKD: Array, routing: Routing
) -> Applied:
    """`each_choice` where every choice's expert has an input of its own: y [N, K, F]."""
    n, k, d = x_NKD.shape
    y_RF, dropped = apply(fn, params, x_NKD.reshape(n * k, d), one_each(routing))
    return Applied(y_RF.reshape(n, k, y_RF.shape[1]), dropped)


def weighted_sum(y_NKD: Array, routing: Routing) -> Array:
    """Sum over a token's choices of weight times output, [N, D] in the type of y.

    Added up in float32 or wider.
    """
    wide = jnp.promote_types(y_NKD.dtype, jnp.float32)
    weighted_NKD = routing.weights_NK[..., None] * y_NKD.astype(wide)
    return jnp.sum(weighted_NKD, axis=1).astype(y_NKD.dtype)
