"""Choosing experts from logits: who is chosen, and what a choice weighs.

A selection is one of each. What may disturb the choice alone (sampling, a balancing bias) is a
`Choose`; the weights then still come from the undisturbed logits. Everything is float32.

Not every selection teaches a router: where weights add up to 1 a single expert's is 1, whatever its
logit, and its gradient is 0. `learns` and `check_learns` know these, `renormalised_among` avoids
them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError

# Logit of an expert outside a token's support. Finite, so that differences of logits, which the
# smooth load forms, stay finite too and no gradient becomes 0 * inf.
OUTSIDE = -1e9
# Least sum of weights that is divided by, where a sum could be 0.
SMALLEST = 1e-6


class Selected(NamedTuple):
    """The part of a `Routing` that a selection decides."""

    experts_NK: Array
    weights_NK: Array
    probs_NE: Array


Select = Callable[[Array, int], Selected]
Choose = Callable[[Array, int], Array]  # (logits_NE, k) -> experts_NK
Weigh = Callable[[Array, Array], Array]  # (logits_NE, experts_NK) -> weights_NK
Probs = Callable[[Array], Array]  # logits_NE -> probs_NE, each row adding up to 1


def pick(values_NE: Array, experts_NK: Array) -> Array:
    """`values_NE` at the chosen experts, [N, K]; 0 where the choice is -1.

    A comparison instead of a gather: its derivative is again a comparison, where a gather's is a
    scatter, which is slow on CPU.
    """
    chosen_NKE = experts_NK[..., None] == jnp.arange(values_NE.shape[-1])
    return jnp.sum(jnp.where(chosen_NKE, values_NE[..., None, :], 0.0), axis=-1)


def top_k(scores_NE: Array, k: int) -> Array:
    """Indices of the k largest scores, descending; of equal scores the lowest index first."""
    _, experts_NK = jax.lax.top_k(jax.lax.stop_gradient(scores_NE), k)
    return experts_NK.astype(jnp.int32)


def sampled_after(best: int, gumbel_NE: Array) -> Choose:
    """The `best` largest logits, then a sample of the others without replacement.

    Gumbel noise `gumbel_NE` added to logits makes their largest a sample from the softmax.
    DeepSpeed's top-1 'RSample' has `best` 0 and its sampled second expert 1; Mod-Squad's
    `sample_topk` of s has k - s.
    """

    def choose(logits_NE: Array, k: int) -> Array:
        # Nothing is left to draw.
        if best >= k:
            return top_k(logits_NE, k)
        sampled_NE = logits_NE + gumbel_NE
        if best == 0:
            return top_k(sampled_NE, k)
        first_NK = top_k(logits_NE, best)
        taken_NE = jnp.any(first_NK[..., None] == jnp.arange(logits_NE.shape[-1]), axis=1)
        rest_NK = top_k(jnp.where(taken_NE, -jnp.inf, sampled_NE), k - best)
        return jnp.concatenate([first_NK, rest_NK], axis=-1)

    return choose


def biased(bias_E: Array, score: Callable[[Array], Array] = jax.nn.sigmoid) -> Choose:
    """The k largest of `score(logits)` plus a bias per expert, which weighs nothing.

    Loss-free balancing (arXiv:2408.15664, eq. 3); `balance.updated_bias` moves the bias.
    """

    def choose(logits_NE: Array, k: int) -> Array:
        # The score of OUTSIDE can be 0, to which a bias may add; half of it leaves room for noise.
        inside_NE = logits_NE > OUTSIDE / 2
        return top_k(jnp.where(inside_NE, score(logits_NE) + bias_E, -jnp.inf), k)

    return choose


def best_groups(scores_NE: Array, groups: int, kept: int, best: int) -> Array:
    """Whether an expert belongs to one of the `kept` best of G equal groups, bool [N, E].

    Groups are neighbours; a group's score is the sum of the `best` largest in it: one in
    DeepSeek-V2 (arXiv:2405.04434, section 2.2.2), two in V3 (arXiv:2412.19437, section 2.1.2).
    """
    n, e = scores_NE.shape
    largest_NGB, _ = jax.lax.top_k(scores_NE.reshape(n, groups, e // groups), best)
    chosen_NK = top_k(largest_NGB.sum(-1), kept)
    chosen_NG = jnp.any(chosen_NK[..., None] == jnp.arange(groups), axis=1)
    return jnp.repeat(chosen_NG, e // groups, axis=-1)


def softmax(logits_NE: Array) -> Array:
    """Softmax over all experts."""
    return jax.nn.softmax(logits_NE, axis=-1)


def sigmoid_share(logits_NE: Array) -> Array:
    """Each expert's sigmoid over the sum of all; the logarithms cannot underflow together."""
    return jax.nn.softmax(jax.nn.log_sigmoid(logits_NE), axis=-1)


def softmax_weights(logits_NE: Array, experts_NK: Array) -> Array:
    """Softmax over all experts, at the chosen ones; not renormalised."""
    return pick(softmax(logits_NE), experts_NK)


def softmax_weights_renormalised(logits_NE: Array, experts_NK: Array) -> Array:
    """Softmax over all experts, at the chosen ones, divided by their sum."""
    weights_NK = softmax_weights(logits_NE, experts_NK)
    return weights_NK / jnp.sum(weights_NK, axis=-1, keepdims=True)


def softmax_of_chosen(logits_NE: Array, experts_NK: Array) -> Array:
    """Softmax over the chosen logits only."""
    return jax.nn.softmax(pick(logits_NE, experts_NK), axis=-1)


def sigmoid_weights(logits_NE: Array, experts_NK: Array) -> Array:
    """The sigmoid of the chosen logits."""
    return pick(jax.nn.sigmoid(logits_NE), experts_NK)


def sigmoid_weights_renormalised(logits_NE: Array, experts_NK: Array) -> Array:
    """The sigmoid of the chosen logits, divided by their sum (DeepSeek-V3, arXiv:2412.19437)."""
    # Sigmoids over their sum, by logarithms: small ones cannot all become 0 and leave 0 / 0.
    return jax.nn.softmax(jax.nn.log_sigmoid(pick(logits_NE, experts_NK)), axis=-1)


def biased_weights_renormalised(
    bias_E: Array, score: Callable[[Array], Array] = jax.nn.sigmoid
) -> Weigh:
    """Score plus bias of the chosen experts, divided by their sum, as SMoRA's published code.

    The sum is kept from 0, which a bias below 0 could bring it to.
    """

    def weigh(logits_NE: Array, experts_NK: Array) -> Array:
        weights_NK = pick(score(logits_NE) + bias_E, experts_NK)
        return weights_NK / jnp.maximum(jnp.sum(weights_NK, axis=-1, keepdims=True), SMALLEST)

    return weigh


def unweighted(logits_NE: Array, experts_NK: Array) -> Array:
    """1 for every chosen expert, which teaches the router nothing: the published quirk of top-1."""
    return jnp.ones(experts_NK.shape, jnp.float32)


def smoothed_softmax_weights(smoothing: float) -> Weigh:
    """`softmax_weights` plus `smoothing`, so that no chosen expert's weight vanishes."""
    return lambda logits_NE, experts_NK: softmax_weights(logits_NE, experts_NK) + smoothing


def scaled(weigh: Weigh, factor: float) -> Weigh:
    """A `Weigh` times a constant (DeepSeek's `routed_scaling_factor`)."""
    return lambda logits_NE, experts_NK: factor * weigh(logits_NE, experts_NK)


@dataclass(frozen=True)
class Selection:
    """A `Select` of its parts: `choose` says who, `weigh` how much, `probs` what losses see."""

    weigh: Weigh
    choose: Choose = top_k
    probs: Probs = softmax

    def __call__(self, logits_NE: Array, k: int) -> Selected:
        experts_NK = self.choose(logits_NE, k)
        return Selected(experts_NK, self.weigh(logits_NE, experts_NK), self.probs(logits_NE))


def softmax_of_all(logits_NE: Array, k: int) -> Selected:
    """Every expert in its own order, weighted by its softmax; k is E. Nobody is left out."""
    probs_NE = softmax(logits_NE)
    experts_E = jnp.arange(k, dtype=jnp.int32)
    return Selected(jnp.broadcast_to(experts_E, probs_NE.shape), probs_NE, probs_NE)


# V-MoE (arXiv:2106.05974, eq. 1-2) and M3ViT (arXiv:2210.14793, eq. 2-4).
softmax_then_top_k = Selection(softmax_weights)
softmax_then_top_k_renormalised = Selection(softmax_weights_renormalised)
# Shazeer et al. (arXiv:1701.06538, eq. 3).
top_k_then_softmax = Selection(softmax_of_chosen)
# The scores of arXiv:2408.15664, and DeepSeek-V3's normalised ones (arXiv:2412.19437, eq. 13).
sigmoid_then_top_k = Selection(sigmoid_weights, probs=sigmoid_share)
sigmoid_then_top_k_renormalised = Selection(sigmoid_weights_renormalised, probs=sigmoid_share)
# Mod-Squad's code (arXiv:2212.08066): the weights add up to more than the chosen probabilities.
_smoothed = smoothed_softmax_weights(1e-4)
smoothed_softmax_then_top_k = Selection(_smoothed)

SELECTIONS: dict[str, Select] = {
    "softmax_then_top_k": softmax_then_top_k,
    "softmax_then_top_k_renormalised": softmax_then_top_k_renormalised,
    "top_k_then_softmax": top_k_then_softmax,
    "sigmoid_then_top_k": sigmoid_then_top_k,
    "sigmoid_then_top_k_renormalised": sigmoid_then_top_k_renormalised,
    "smoothed_softmax_then_top_k": smoothed_softmax_then_top_k,
}

# Weights that add up to 1, each with the one that does not: what a single choice needs.
ADD_UP: dict[Weigh, Weigh] = {
    softmax_weights_renormalised: softmax_weights,
    softmax_of_chosen: softmax_weights,
    sigmoid_weights_renormalised: sigmoid_weights,
}
# Weights that are constant where there is only one expert to choose from.
OF_SEVERAL: tuple[Weigh, ...] = (*ADD_UP, softmax_weights, _smoothed)


def learns(select: Select, k: int, experts: int | None = None) -> bool:
    """Whether a router that chooses k of so many experts is taught by what they give.

    experts: None means several. A selection of a kind that is not known here is taken to learn.
    """
    weigh = getattr(select, "weigh", None)
    if experts == 1:
        return select is not softmax_of_all and weigh not in OF_SEVERAL
    return k > 1 or weigh not in ADD_UP


def check_learns(
    select: Select, k: int, experts: int | None = None, said: str | None = None
) -> None:
    """Raise UserError where a router would never learn what to choose.

    experts: as in `learns`; routers do not ask, because a part of a model may have one left.
    said: how the options of this choice are called where they were given.
    """
    if learns(select, k, experts):
        return
    if experts == 1:
        raise UserError(
            f"{said or 'The router has 1 expert'}: there is nothing to choose, so its weight is "
            "always 1 and its router would never learn; take 2 experts or more."
        )
    weigh = ADD_UP[select.weigh]  # type: ignore[attr-defined]
    instead = next(n for n, s in SELECTIONS.items() if getattr(s, "weigh", None) is weigh)
    raise UserError(
        f"{said or 'The router chooses 1 expert'}: weights that add up to 1 make that of a single "
        f"expert 1 whatever its logit, so its router would never learn; take {instead}, or 2 "
        "experts or more for each token."
    )


def renormalised_among(k: int) -> Selection:
    """Softmax, then the k largest: several weights add up to 1, a single one is its probability.

    So a single choice learns, too (Switch, arXiv:2101.03961, eq. 2; Uni-Perceiver-MoE's code).
    """
    return softmax_then_top_k if k == 1 else softmax_then_top_k_renormalised
