"""Balance losses and usage statistics: pure functions of a `Routing`.

First the losses of all tokens together (importance, load, Switch, z, entropy), then those that also
read each token's task (mutual information). Tokens outside `mask_N` count nowhere, so a narrower
mask gives the losses of one task. Everything is float32 with finite gradients, for balanced and
collapsed routing and for no token at all. Losses are unweighted scalars. The table of tasks and
experts is linear in the tokens, so steps and devices may add up theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.stats import norm

from moezoo.ops.routing import Routing, pick, top_k

Spread = Callable[[Array], Array]
Amount = Callable[[Routing], Array]


def cv_squared(values_E: Array) -> Array:
    """Squared coefficient of variation, unbiased variance; 0 for a single value.

    Shazeer et al. (arXiv:1701.06538, eq. 7); 1e-10 keeps it finite where the mean is 0.
    """
    if values_E.shape[0] == 1:
        # The unbiased variance of one value is 0 / 0.
        return jnp.zeros((), jnp.float32)
    mean = jnp.mean(values_E)
    return jnp.var(values_E, ddof=1) / (mean**2 + 1e-10)


def cv_squared_population(values_E: Array) -> Array:
    """Squared coefficient of variation, population variance (V-MoE); 0 where the mean is 0."""
    mean_squared = jnp.mean(values_E) ** 2
    # Amounts are not negative, so where their mean is 0 the variance is 0, whatever divides it.
    return jnp.var(values_E) / jnp.where(mean_squared > 0, mean_squared, 1.0)


def choice_counts(routing: Routing) -> Array:
    """Tokens that chose each expert, int32 [E]."""
    return jnp.sum(_chosen(routing), axis=0, dtype=jnp.int32)


def gate_sums(routing: Routing) -> Array:
    """Sum of the weights given to each expert, float32 [E]: M3ViT's importance."""
    return jnp.sum(jnp.where(_choices(routing), routing.weights_NK[..., None], 0.0), axis=(0, 1))


def prob_sums(routing: Routing) -> Array:
    """Sum of each expert's probability under the clean logits, float32 [E]: V-MoE's importance."""
    # Not `routing.probs_NE`, which come from the noisy logits.
    probs_NE = jax.nn.softmax(routing.logits_NE, axis=-1)
    return jnp.sum(jnp.where(routing.mask_N[:, None], probs_NE, 0.0), axis=0)


def smooth_load(routing: Routing) -> Array:
    """Expected number of tokens per expert if the noise were drawn again, float32 [E].

    Shazeer et al. (arXiv:1701.06538, eq. 8-10): an expert is chosen when its fresh logit exceeds
    the K-th largest of the others, which is the (K+1)-th largest of all for an expert that is in
    and the K-th for one that is out. Hard counts, without gradient, where K = E or the token has
    no noise.
    """
    return _load(routing, routing.noisy_NE)


def smooth_load_mixed_spaces(routing: Routing) -> Array:
    """`smooth_load` with M3ViT's slip: logits compared with thresholds taken from probabilities."""
    return _load(routing, routing.probs_NE)


def smooth_load_one_threshold(routing: Routing) -> Array:
    """V-MoE's form of the load: the K-th largest noisy logit is everybody's threshold, float32 [E].

    arXiv:2106.05974, appendix A. Without noise, hard counts without gradient.
    """
    k = routing.experts_NK.shape[-1]
    threshold_N1 = pick(routing.noisy_NE, routing.experts_NK)[:, k - 1 : k]
    return _expected(routing, threshold_N1)


def _load(routing: Routing, scores_NE: Array) -> Array:
    """Smooth load whose thresholds are the K-th and (K+1)-th largest of `scores_NE`."""
    k = routing.experts_NK.shape[-1]
    if k == routing.logits_NE.shape[-1]:
        # Every expert is chosen: there is no (K+1)-th logit to be a threshold.
        return choice_counts(routing).astype(jnp.float32)
    # Always in the order of the logits, which probabilities share; only what is compared differs.
    best_NK = pick(scores_NE, top_k(routing.noisy_NE, k + 1))
    if_in_N1, if_out_N1 = best_NK[:, k:], best_NK[:, k - 1 : k]
    return _expected(routing, jnp.where(routing.noisy_NE > if_in_N1, if_in_N1, if_out_N1))


def _expected(routing: Routing, threshold_NE: Array) -> Array:
    """Sum over tokens of the probability that a fresh noisy logit exceeds `threshold_NE`."""
    # M3ViT's border between noise and none. Where there is none 1 divides instead: the quotient is
    # not used there, but its gradient must be finite all the same.
    noisy_NE = routing.noise_scale_NE > 1e-6
    scale_NE = jnp.where(noisy_NE, routing.noise_scale_NE, 1.0)
    smooth_NE = norm.cdf((routing.logits_NE - threshold_NE) / scale_NE)
    load_NE = jnp.where(noisy_NE, smooth_NE, _chosen(routing).astype(jnp.float32))
    return jnp.sum(jnp.where(routing.mask_N[:, None], load_NE, 0.0), axis=0)


def _choices(routing: Routing) -> Array:
    """Whether a real token's choice is an expert, bool [N, K, E]."""
    experts = jnp.arange(routing.logits_NE.shape[-1])
    return (routing.experts_NK[..., None] == experts) & routing.mask_N[:, None, None]


def _chosen(routing: Routing) -> Array:
    """Whether a real token chose an expert, bool [N, E]."""
    return jnp.any(_choices(routing), axis=1)


class Together:
    """A loss that judges the tokens of all tasks together; others judge each task by itself."""

    def __init__(self, loss: Callable[[Routing], Array]):
        self.loss = loss

    def __call__(self, routing: Routing) -> Array:
        return self.loss(routing)


def importance_loss(
    routing: Routing, amount: Amount = gate_sums, spread: Spread = cv_squared
) -> Array:
    """Uneven importance of the experts: `spread` of `amount` over the experts.

    M3ViT as it stands; V-MoE with `prob_sums` and `cv_squared_population`.
    """
    return spread(amount(routing))


def load_loss(routing: Routing, amount: Amount = smooth_load, spread: Spread = cv_squared) -> Array:
    """Uneven expected load of the experts, thresholds among the logits (the sound form).

    V-MoE with `smooth_load_one_threshold` and `cv_squared_population`.
    """
    return spread(amount(routing))


def load_loss_mixed_spaces(routing: Routing, spread: Spread = cv_squared) -> Array:
    """`load_loss` as the M3ViT reference computes it; see `smooth_load_mixed_spaces`."""
    return spread(smooth_load_mixed_spaces(routing))


def switch_loss(routing: Routing) -> Array:
    """E * sum over experts of (share of tokens whose first choice it is) * (mean probability).

    Switch (arXiv:2101.03961, eq. 4-6); the same number as GShard's loss in V-MoE and in DeepSpeed's
    top-1 and top-2 gates. 1 when balanced.
    """
    # Counts have no derivative: the gradient comes through the probabilities only, as published.
    first_E = jnp.sum(_choices(routing)[:, 0], axis=0)
    return _share_times_probability(routing, first_E / _tokens(routing), 0.0)


def switch_loss_of_choices(routing: Routing, smoothing: float = 0.0) -> Array:
    """`switch_loss` with a token's K choices counted alike, as shares of all choices.

    DeepSpeed's top-k gate; Mod-Squad's too, with a `smoothing` of 1e-4 added to every probability.
    """
    counts_E = choice_counts(routing).astype(jnp.float32)
    return _share_times_probability(routing, counts_E / jnp.maximum(counts_E.sum(), 1), smoothing)


def _share_times_probability(routing: Routing, share_E: Array, smoothing: float) -> Array:
    experts = routing.logits_NE.shape[-1]
    probs_NE = jnp.where(routing.mask_N[:, None], routing.probs_NE, 0.0)
    mean_E = jnp.sum(probs_NE, axis=0) / _tokens(routing)
    # Smoothed probabilities add up to 1 + E * smoothing; Mod-Squad makes shares of them again.
    return experts * jnp.sum(share_E * (mean_E + smoothing)) / (1.0 + experts * smoothing)


def z_loss(routing: Routing, smoothing: float = 0.0) -> Array:
    """Mean squared log-sum-exp of the clean logits (ST-MoE, arXiv:2202.08906, eq. 5).

    Mod-Squad adds a `smoothing` of 1e-4 to the sum.
    """
    z_N = jax.nn.logsumexp(routing.logits_NE, axis=-1)
    if smoothing:
        # The sum itself is never formed: it could overflow.
        z_N = jnp.logaddexp(z_N, math.log(smoothing))
    return jnp.sum(jnp.where(routing.mask_N, z_N**2, 0.0)) / _tokens(routing)


def _tokens(routing: Routing) -> Array:
    """Number of real tokens, at least 1, float32."""
    return jnp.maximum(jnp.sum(routing.mask_N), 1).astype(jnp.float32)


def usage_entropy(routing: Routing, amount: Amount = prob_sums) -> Array:
    """Entropy, in nats, of how `amount` is divided among the experts: log E when it is even."""
    amount_E = amount(routing).astype(jnp.float32)
    total = jnp.sum(amount_E)
    share_E = amount_E / jnp.where(total > 0, total, 1.0)
    # The inner `where` keeps log 0 out: its gradient would be NaN in the branch not taken, too.
    used_E = share_E > 0
    return -jnp.sum(jnp.where(used_E, share_E * jnp.log(jnp.where(used_E, share_E, 1.0)), 0.0))


def usage_entropy_loss(routing: Routing, amount: Amount = prob_sums) -> Array:
    """log E - `usage_entropy`: 0 when the use is even, or when there are no tokens."""
    full = math.log(routing.logits_NE.shape[-1])
    return jnp.where(jnp.any(routing.mask_N), full - usage_entropy(routing, amount), 0.0)


def updated_bias(bias_E: Array, counts_E: Array, rate: float) -> Array:
    """The bias for the next step's choice: up by `rate` where an expert had too few, else down.

    counts_E: int32. Loss-free balancing (arXiv:2408.15664, algorithm 1): the sign of mean - count,
    no gradient.
    """
    # In whole numbers: a compiled mean of floats is a sum times a rounded 1 / E, which misses a
    # count that is just the mean, and then every such bias would move.
    total = jnp.sum(counts_E)
    floor, rest = total // counts_E.shape[0], total % counts_E.shape[0]
    side_E = jnp.where(counts_E == floor, jnp.sign(rest), jnp.sign(floor - counts_E))
    return bias_E + rate * side_E.astype(jnp.float32)


def task_expert_sums(routing: Routing, task_N: Array, tasks: int, smoothing: float = 0.0) -> Array:
    """Sum of each expert's probability over each task's tokens, float32 [J, E].

    `smoothing` is added to every probability.
    """
    real_N1 = routing.mask_N[:, None]
    of_task_NJ = ((task_N[:, None] == jnp.arange(tasks)) & real_N1).astype(jnp.float32)
    probs_NE = jnp.where(real_N1, routing.probs_NE + smoothing, 0.0)
    # Else accelerators round the probabilities to TF32 or bfloat16 before they add them up.
    return jnp.einsum("nj,ne->je", of_task_NJ, probs_NE, precision=jax.lax.Precision.HIGHEST)


def mutual_information(sums_JE: Array) -> Array:
    """I(task; expert) in nats of a table of sums; 0 for an empty one.

    With equally many tokens per task it is H(expert) - H(expert | task): even use of the experts
    over all tasks, few experts within one. Mod-Squad (arXiv:2212.08066, eq. 3-5).
    """
    total = jnp.sum(sums_JE)
    joint_JE = sums_JE / jnp.where(total > 0, total, 1.0)
    task_J1 = jnp.sum(joint_JE, axis=1, keepdims=True)
    expert_1E = jnp.sum(joint_JE, axis=0, keepdims=True)
    # Three entropies instead of the log of a ratio: nothing is divided by a margin that is 0.
    return _negentropy(joint_JE) - _negentropy(task_J1) - _negentropy(expert_1E)


def _negentropy(p: Array) -> Array:
    """Sum of p log p, 0 where p is 0, with gradient 0 there."""
    some = p > 0
    return jnp.sum(jnp.where(some, p * jnp.log(jnp.where(some, p, 1.0)), 0.0))


def mutual_information_loss(routing: Routing, task_N: Array, tasks: int) -> Array:
    """- I(task; expert): each task to few experts, all experts used."""
    return -mutual_information(task_expert_sums(routing, task_N, tasks))


def mutual_information_loss_smoothed(
    routing: Routing, task_N: Array, tasks: int, smoothing: float = 1e-4
) -> Array:
    """`mutual_information_loss` as Mod-Squad's code has it, with `smoothing` in five places.

    It is added to every probability, to the number of tokens, to both margins and inside the
    logarithm; the joint table then adds up to 1 + E * `smoothing`.
    """
    sums_JE = task_expert_sums(routing, task_N, tasks, smoothing)
    # As published: choices over K, in which a token counts once.
    tokens = jnp.sum(choice_counts(routing)) / routing.experts_NK.shape[-1]
    joint_JE = sums_JE / (tokens + smoothing)
    task_J1 = jnp.sum(joint_JE, axis=1, keepdims=True) + smoothing
    expert_1E = jnp.sum(joint_JE, axis=0, keepdims=True) + smoothing
    return -jnp.sum(joint_JE * jnp.log(joint_JE / task_J1 / expert_1E + smoothing))


def few_experts_loss(
    routing: Routing, task_N: Array, tasks: int, free: int, smoothing: float = 0.0
) -> Array:
    """Squared use of all but the `free` most used experts, whose use costs nothing.

    An expert's use is the sum over tasks of its mean probability (plus `smoothing`, 1e-4 in
    Mod-Squad's code, where this is the top-k loss).
    """
    sums_JE = task_expert_sums(routing, task_N, tasks, smoothing)
    here_NJ = (task_N[:, None] == jnp.arange(tasks)) & routing.mask_N[:, None]
    # At least 1: a task without tokens in this batch adds 0.
    use_E = jnp.sum(sums_JE / jnp.maximum(jnp.sum(here_NJ, axis=0), 1)[:, None], axis=0)
    free_K = top_k(use_E[None], min(free, use_E.shape[0]))[0]
    costs_E = ~jnp.any(free_K[:, None] == jnp.arange(use_E.shape[0]), axis=0)
    return jnp.sum(jnp.where(costs_E, use_E**2, 0.0))
