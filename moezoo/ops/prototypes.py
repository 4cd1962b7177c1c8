"""Routing by prototypes: a vector per expert, how alike an input is to it, and where it comes from.

Arrow (Ostapenko et al., arXiv:2405.11157, section 4): an expert's prototype is the direction of its
inputs that its update A B makes longest, and a token's logit is |x . p|. PHATGOOSE
(arXiv:2402.05859) learns prototypes and takes x . p of normalised vectors; token-level adaptation
(arXiv:2311.10847) and RouterRetriever the cosine with a mean embedding; MoCLE (arXiv:2312.12379)
the nearest of several centres. Float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.exact import exact_product
from moezoo.ops.selection import top_k

SHORTEST = 1e-6  # least length that is divided by
VARIANCE = 1e-5  # added to a variance, as PyTorch's layer norm does

Normalise = Callable[[Array], Array]  # [..., D] -> [..., D]
Likeness = Callable[[Array, Array], Array]  # (x_ND, prototypes_ED) -> scores_NE


def unchanged(x: Array) -> Array:
    """The vectors as they are."""
    return x


def of_unit_length(x: Array) -> Array:
    """Vectors of length 1; the derivative at 0 is 0, and so is the vector."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / jnp.maximum(length, SHORTEST)


def over_width(x: Array) -> Array:
    """Layer norm of each vector, without a gain."""
    return _standard(x, -1)


def over_experts(prototypes_ED: Array) -> Array:
    """Layer norm of each coordinate over all experts, for prototypes only."""
    return _standard(prototypes_ED, 0)


def _standard(x: Array, axis: int) -> Array:
    mean = x.mean(axis, keepdims=True)
    return (x - mean) / jnp.sqrt(x.var(axis, keepdims=True) + VARIANCE)


def dot(x_ND: Array, prototypes_ED: Array) -> Array:
    """x . p."""
    return exact_product(x_ND, prototypes_ED.T)


def absolute_dot(x_ND: Array, prototypes_ED: Array) -> Array:
    """|x . p|: the sign of a singular vector is arbitrary."""
    return jnp.abs(dot(x_ND, prototypes_ED))


def cosine(x_ND: Array, prototypes_ED: Array) -> Array:
    """The cosine; 0 with a vector of length 0."""
    return dot(of_unit_length(x_ND.astype(jnp.float32)), of_unit_length(prototypes_ED))


def nearness(x_ND: Array, prototypes_ED: Array) -> Array:
    """The negative Euclidean distance."""
    # Differences, not a square opened up: that would lose near ones to rounding.
    apart_NED = x_ND.astype(jnp.float32)[:, None] - prototypes_ED
    square_NE = jnp.sum(apart_NED**2, axis=-1)
    return -jnp.where(square_NE > 0, jnp.sqrt(jnp.where(square_NE > 0, square_NE, 1.0)), 0.0)


LIKENESSES: dict[str, Likeness] = {
    "dot": dot,
    "absolute_dot": absolute_dot,
    "cosine": cosine,
    "nearness": nearness,
}
INPUT_NORMS: dict[str, Normalise] = {
    "none": unchanged,
    "unit": of_unit_length,
    "width": over_width,
}
PROTOTYPE_NORMS: dict[str, Normalise] = {**INPUT_NORMS, "experts": over_experts}


@dataclass(frozen=True)
class PrototypeScore:
    """Logits [N, E] = likeness(norm x, norm p) / temperature; Arrow's by default.

    temperature: None is the square root of the width.
    """

    likeness: Likeness = absolute_dot
    of_input: Normalise = unchanged
    of_prototype: Normalise = unchanged
    temperature: float | None = 1.0

    def __call__(self, x_ND: Array, prototypes_ED: Array) -> Array:
        scores_NE = self.likeness(
            self.of_input(x_ND.astype(jnp.float32)), self.of_prototype(prototypes_ED)
        )
        root = prototypes_ED.shape[-1] ** 0.5
        return scores_NE / (root if self.temperature is None else self.temperature)


ARROW = PrototypeScore()
PHATGOOSE = PrototypeScore(dot, over_width, over_width, None)


def svd_prototype(a_Dr: Array, b_rO: Array) -> tuple[Array, Array]:
    """The unit vector [D] for which |p A B| is largest, and that length; its sign is arbitrary.

    From the small factors: with A = Q R and B = (S T)^t it is Q times the first left singular
    vector of R T^t, so no [D, O] matrix is formed. An update of zeros makes nothing longest: length
    0, and the vector of zeros, which no input is like.
    """
    with jax.default_matmul_precision("highest"):
        q_Dr, r_rr = jnp.linalg.qr(a_Dr.astype(jnp.float32))
        _, t_rr = jnp.linalg.qr(b_rO.astype(jnp.float32).T)
        left_rr, values_r, _ = jnp.linalg.svd(r_rr @ t_rr.T)
        longest_D = jnp.where(values_r[0] == 0, 0.0, q_Dr @ left_rr[:, 0])  # NaN stays
        return longest_D, values_r[0]


def tied_prototype(a_Dr: Array, ups: list[Array]) -> tuple[Array, Array]:
    """`svd_prototype` of layers that share A and their input: of A [B_1 B_2 ...]."""
    return svd_prototype(a_Dr, jnp.concatenate(ups, axis=1))


def nearest(x_ND: Array, centres_CD: Array) -> Array:
    """The centre at the least distance from each row, int32 [N]; of equal ones the first."""
    return top_k(nearness(x_ND, centres_CD), 1)[:, 0]


def labelled_mean(scores_NP: Array, label_P: Array, experts: int) -> Array:
    """The mean score of each expert's prototypes, [N, E]; -inf for one that has none.

    RouterRetriever (arXiv:2409.02685): several prototypes stand for one expert.
    """
    hot_PE = (label_P[:, None] == jnp.arange(experts)).astype(jnp.float32)
    count_E = hot_PE.sum(0)
    means_NE = exact_product(scores_NP.astype(jnp.float32), hot_PE) / jnp.maximum(count_E, 1.0)
    return jnp.where(count_E > 0, means_NE, -jnp.inf)


def labelled_max(scores_NP: Array, label_P: Array, experts: int) -> Array:
    """The largest score of each expert's prototypes, [N, E]; -inf for one that has none.

    What RouterRetriever's code does, where its paper takes the mean.
    """
    hot_PE = label_P[:, None] == jnp.arange(experts)
    return jnp.where(hot_PE, scores_NP.astype(jnp.float32)[..., None], -jnp.inf).max(-2)


def boosted_softmax(scores_NE: Array, boost: float = 4.0) -> Array:
    """Softmax after the largest score was multiplied by `boost`: token-level adaptation.

    Its "temperature" of 4 touches the largest alone. Where that is below 0 it becomes the smallest,
    as published.
    """
    first_N1 = top_k(scores_NE, 1)
    largest_NE = first_N1 == jnp.arange(scores_NE.shape[-1])
    return jax.nn.softmax(jnp.where(largest_NE, boost * scores_NE, scores_NE), axis=-1)


def standardised_softmax(scores_NE: Array) -> Array:
    """Softmax of scores less their mean over their deviation (ELREA, arXiv:2502.00089).

    Equal scores share evenly.
    """
    apart_NE = scores_NE - scores_NE.mean(-1, keepdims=True)
    spread_N1 = scores_NE.std(-1, keepdims=True)
    some = spread_N1 > SHORTEST
    return jax.nn.softmax(jnp.where(some, apart_NE / jnp.where(some, spread_N1, 1.0), 0.0), -1)


def chosen_and_universal(probs_NE: Array) -> tuple[Array, Array]:
    """MoCLE's weights: the best expert's probability p [N, E], 0 for others, and 1 - p [N, 1].

    Published code weighs the best by p * p (`twice_weighted`), which we take for an accident.
    """
    first_N1 = top_k(probs_NE, 1)
    hot_NE = first_N1 == jnp.arange(probs_NE.shape[-1])
    best_N1 = jnp.sum(jnp.where(hot_NE, probs_NE, 0.0), axis=-1, keepdims=True)
    return jnp.where(hot_NE, probs_NE, 0.0), 1.0 - best_N1


def twice_weighted(probs_NE: Array) -> tuple[Array, Array]:
    """Quirk of MoCLE's code: the gate is multiplied in before the dispatcher and again behind."""
    best_NE, universal_N1 = chosen_and_universal(probs_NE)
    return best_NE**2, universal_N1


def expert_cross_entropy(logits_NE: Array, expert_N: Array) -> Array:
    """Mean of -log softmax(logits) at the expert that a token should choose; below 0 = no token.

    MeteoRA's gate loss (arXiv:2405.13053): a LoRA's own task is its label. 0 without any token.
    """
    real_N = expert_N >= 0
    hot_NE = expert_N[:, None] == jnp.arange(logits_NE.shape[-1])
    logs_N = jnp.sum(jnp.where(hot_NE, jax.nn.log_softmax(logits_NE, axis=-1), 0.0), axis=-1)
    return -jnp.sum(jnp.where(real_N, logs_N, 0.0)) / jnp.maximum(real_N.sum(), 1)


def projected(gradient_P: Array, key: Array, width: int) -> Array:
    """A gradient's feature: a random projection to `width` numbers, of length 1 (ELREA).

    The same key gives the same projection; a gradient of 0 gives 0.
    """
    # Signs, drawn in slices, so that no [P, width] matrix of all parameters is ever held.
    keys = jax.random.split(key, width)
    sums = jax.lax.map(
        lambda k: jnp.vdot(jax.random.rademacher(k, gradient_P.shape, jnp.float32), gradient_P),
        keys,
    )
    return of_unit_length(sums)
