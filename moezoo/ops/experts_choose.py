"""Experts choose their tokens: every expert takes the C tokens that want it most."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moezoo.ops.routing import Noise, Routing, no_noise, route, softmax_then_top_k, top_k


class Choice(NamedTuple):
    """What the experts decided.

    tokens_EC: int32, descending preference. weights_EC: float32, the token's probability of the
    expert. `routing` says the same from the tokens' side, with K = E: rank e is expert e or -1.
    """

    tokens_EC: Array
    weights_EC: Array
    routing: Routing


def experts_choose(
    logits_NE: Array,
    *,
    slots: int,
    noise: Noise = no_noise,
    key: Array | None = None,
    eps_NE: Array | None = None,
    mask_N: Array | None = None,
) -> Choice:
    """Expert choice (arXiv:2202.09368) in V-MoE's form: softmax over experts, weights as they are.

    Every expert takes `slots` tokens, all of them where there are fewer; a token gets 0 to E
    experts. Padded tokens are taken last and get no expert. The arguments are those of `route`.
    """
    n, e = logits_NE.shape
    every = route(
        logits_NE,
        k=e,
        select=softmax_then_top_k,
        noise=noise,
        key=key,
        eps_NE=eps_NE,
        mask_N=mask_N,
    )
    wanted_EN = jnp.where(every.mask_N, every.probs_NE.T, -1.0)
    tokens_EC = top_k(wanted_EN, min(slots, n))
    taken_EN = jnp.zeros((e, n), bool).at[jnp.arange(e)[:, None], tokens_EC].set(True)
    taken_NE = taken_EN.T & every.mask_N[:, None]
    routing = every._replace(
        experts_NK=jnp.where(taken_NE, jnp.arange(e, dtype=jnp.int32), -1),
        weights_NK=jnp.where(taken_NE, every.probs_NE, 0.0),
    )
    weights_EC = jnp.take_along_axis(every.probs_NE.T, tokens_EC, axis=1)
    return Choice(tokens_EC, weights_EC, routing)
