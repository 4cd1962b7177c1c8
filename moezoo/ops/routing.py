"""From router logits to a decision: which experts a token goes to, and with what weight.

`route` lets every token choose its own experts by a selection of `selection.py`; `experts_choose`
lets every expert take the tokens that want it most. Both give a `Routing`. All arithmetic is
float32, whatever the type of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.selection import (
    OUTSIDE,
    SELECTIONS,
    Select,
    Selected,
    pick,
    softmax_then_top_k,
    softmax_then_top_k_renormalised,
    top_k,
    top_k_then_softmax,
)

__all__ = [
    "OUTSIDE",
    "SELECTIONS",
    "Noise",
    "Noisy",
    "Routing",
    "Select",
    "Selected",
    "constant_noise",
    "dense_weights",
    "draw_lots",
    "drop_small_weights",
    "expert_range",
    "learned_noise",
    "map_rows",
    "no_noise",
    "only",
    "pick",
    "route",
    "softmax_then_top_k",
    "softmax_then_top_k_renormalised",
    "top_k",
    "top_k_then_softmax",
]


class Routing(NamedTuple):
    """What a router decided for N tokens over E experts.

    experts_NK: int32, descending preference; -1 = no expert (padded token, outside the support).
    weights_NK: float32, multiplies the expert's output; 0 where `experts_NK` is -1.
    probs_NE: float32 distribution over all experts that the choice was made from; 0 for padded
      tokens.
    logits_NE: float32 clean router logits; 0 for padded tokens.
    noisy_NE: float32 logits after noise; equal to `logits_NE` when there is none.
    noise_scale_NE: float32, standard deviation of the noise; 0 where there is none.
    mask_N: bool, False = padding.
    lot_NK: float32 draw for each choice, where a capacity is to be shared out at random.
    """

    experts_NK: Array
    weights_NK: Array
    probs_NE: Array
    logits_NE: Array
    noisy_NE: Array
    noise_scale_NE: Array
    mask_N: Array
    lot_NK: Array | None = None


def map_rows(change: Callable[..., Array], *routings: Routing) -> Routing:
    """A decision whose every field is `change` of that field's arrays in the given decisions.

    change: of arrays whose first axis is that of tokens, as all of a `Routing` have it; for slices,
    repetitions, joins and other orders of the tokens.
    """
    return jax.tree.map(change, *routings)


class Noisy(NamedTuple):
    """Logits after noise, and the noise's standard deviation: [N, E], or [N, 1] or [1, 1] where
    experts or all have the same.
    """

    logits_NE: Array
    scale_NE: Array


Noise = Callable[[Array, Array, Array], Noisy]


def no_noise(logits_NE: Array, eps_NE: Array, allowed_N1: Array) -> Noisy:
    """The logits as they are."""
    return Noisy(logits_NE, jnp.zeros((1, 1), jnp.float32))


def constant_noise(std: float) -> Noise:
    """Gaussian noise of standard deviation `std` / (experts a token may choose from).

    V-MoE (arXiv:2106.05974, section 2.2) and M3ViT divide by the number of experts.
    """

    def noise(logits_NE: Array, eps_NE: Array, allowed_N1: Array) -> Noisy:
        scale_N1 = std / jnp.maximum(allowed_N1, 1).astype(jnp.float32)
        return Noisy(logits_NE + scale_N1 * eps_NE, scale_N1)

    return noise


def learned_noise(raw_NE: Array, floor: float = 0.01) -> Noise:
    """Gaussian noise of standard deviation softplus(`raw_NE`) + `floor`.

    `raw_NE` is a second linear map of the router's input (arXiv:1701.06538, eq. 4).
    """

    def noise(logits_NE: Array, eps_NE: Array, allowed_N1: Array) -> Noisy:
        scale_NE = jax.nn.softplus(raw_NE.astype(jnp.float32)) + floor
        return Noisy(logits_NE + scale_NE * eps_NE, scale_NE)

    return noise


def route(
    logits_NE: Array,
    *,
    k: int,
    select: Select = softmax_then_top_k,
    noise: Noise = no_noise,
    key: Array | None = None,
    eps_NE: Array | None = None,
    mask_N: Array | None = None,
    support_NE: Array | None = None,
) -> Routing:
    """Decide k experts per token.

    logits_NE: [N, E], any float type. `noise` acts only when there is a `key` or a standard-normal
    sample `eps_NE` [N, E] to draw it from: a call without either is deterministic.
    mask_N: bool, False = padding, which is sent nowhere and may hold any value.
    support_NE: bool [E] or [N, E], the experts a token may choose from (at least one per token);
    a token with fewer than k of them gets -1 for the rest.
    Raises ValueError when k is not in 1..E.
    """
    n, e = logits_NE.shape
    if not 1 <= k <= e:
        raise ValueError(f"cannot choose k={k} of {e} experts: k must be between 1 and {e}")
    mask_N = jnp.ones((n,), bool) if mask_N is None else mask_N
    allowed_NE = jnp.ones((1, e), bool) if support_NE is None else jnp.atleast_2d(support_NE)
    # Padding is taken out before any arithmetic: NaN times 0 would stay NaN.
    clean_NE = jnp.where(mask_N[:, None], logits_NE.astype(jnp.float32), 0.0)
    clean_NE = jnp.where(allowed_NE, clean_NE, OUTSIDE)
    if eps_NE is None and key is not None and noise is not no_noise:
        # Float32 whatever the logits came as: the choice must not depend on the model's type.
        eps_NE = jax.random.normal(key, (n, e), jnp.float32)
    acting, eps_NE = (no_noise, clean_NE) if eps_NE is None else (noise, eps_NE)
    noisy_NE, scale_NE = acting(clean_NE, eps_NE, jnp.sum(allowed_NE, axis=-1, keepdims=True))
    noisy_NE = jnp.where(mask_N[:, None] & allowed_NE, noisy_NE, clean_NE)
    # Noise moves weights as well as the choice, as in V-MoE and M3ViT.
    experts_NK, weights_NK, probs_NE = select(noisy_NE, k)
    # Where fewer than k are allowed, the k largest include others: these are taken back here.
    inside_NK = experts_NK >= 0
    if support_NE is not None:
        inside_NK = pick(jnp.where(allowed_NE, 1.0, 0.0), experts_NK) > 0
    chosen_NK = mask_N[:, None] & inside_NK
    return Routing(
        experts_NK=jnp.where(chosen_NK, experts_NK, -1),
        weights_NK=jnp.where(chosen_NK, weights_NK, 0.0),
        probs_NE=jnp.where(mask_N[:, None], probs_NE, 0.0),
        logits_NE=clean_NE,
        noisy_NE=noisy_NE,
        noise_scale_NE=jnp.broadcast_to(scale_NE, (n, e)),
        mask_N=mask_N,
    )


def expert_range(start: Array, size: int, experts: int) -> Array:
    """Support of `size` consecutive experts from `start`, bool [..., E]; `start` int32 [...]."""
    index_E = jnp.arange(experts)
    start = jnp.asarray(start)[..., None]
    return (index_E >= start) & (index_E < start + size)


def drop_small_weights(routing: Routing, threshold: float) -> Routing:
    """Set weights at or below `threshold` to 0; the experts stay chosen (M3ViT `expert_prune`)."""
    kept_NK = jnp.where(routing.weights_NK > threshold, routing.weights_NK, 0.0)
    return routing._replace(weights_NK=kept_NK)


def only(routing: Routing, keep_N: Array) -> Routing:
    """The decision as if the tokens where `keep_N` (bool) is False were padding.

    For losses and statistics of a part of the tokens, for example one task's.
    """
    mask_N = routing.mask_N & keep_N
    return routing._replace(
        # `logits_NE` stay: losses that read them look at the mask.
        experts_NK=jnp.where(mask_N[:, None], routing.experts_NK, -1),
        weights_NK=jnp.where(mask_N[:, None], routing.weights_NK, 0.0),
        probs_NE=jnp.where(mask_N[:, None], routing.probs_NE, 0.0),
        mask_N=mask_N,
    )


def dense_weights(routing: Routing, experts: int) -> Array:
    """The weight of every expert for every token, float32 [N, E]; 0 where it was not chosen."""
    chosen_NKE = routing.experts_NK[..., None] == jnp.arange(experts)
    return jnp.sum(jnp.where(chosen_NKE, routing.weights_NK[..., None], 0.0), axis=1)


def ordered_weights(routing: Routing, experts: int) -> Array:
    """`dense_weights` of a decision that gives every token all experts in their own order.

    That compares N E E numbers for the same. Raises ValueError where K is not E.
    """
    if routing.weights_NK.shape[1] != experts:
        raise ValueError(f"{routing.weights_NK.shape[1]} choices are not all {experts} experts")
    return routing.weights_NK


def draw_lots(routing: Routing, key: Array) -> Routing:
    """Draw a uniform number per choice, for `capacity.by_lot`."""
    return routing._replace(lot_NK=jax.random.uniform(key, routing.experts_NK.shape))


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
    # For its noise, mask and probabilities only: what tokens choose is replaced below.
    every = route(
        logits_NE,
        k=e,
        select=softmax_then_top_k,
        noise=noise,
        key=key,
        eps_NE=eps_NE,
        mask_N=mask_N,
    )
    # Below every probability, the 0 of an expert that nobody wants included.
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
