"""Shares of skills from a table of logits: Polytropon's normalisers, its prior, mixing by heads.

Ponti et al., "Combining Modular Skills in Multitask Learning" (arXiv:2202.13914): every task has a
logit per skill, and a skill's share is its sigmoid over the sum of all. Caccia et al., "Multi-Head
Adapter Routing" (arXiv:2211.03831): S heads have shares of their own; head q of a bank mixes the
q-th of S equal parts of the inputs and of the outputs. S = 1 is Polytropon.

Logits and shares are float32 [..., E], one row for each head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import gammaln

from moezoo.ops.exact import EXACT
from moezoo.ops.selection import Select, Selected, sigmoid_share

SkillShares = Callable[[Array], Array]  # logits [..., E] -> shares [..., E]

SHORTEST = 1e-12  # least length that a row of logits is divided by


def unit_length(logits_E: Array) -> Array:
    """Logits over their length: signed shares, without any sigmoid."""
    square = jnp.sum(logits_E**2, axis=-1, keepdims=True)
    # The root has no derivative at 0, so a 0 never reaches it.
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return logits_E / jnp.maximum(length, SHORTEST)


def rounded_share(logits_E: Array) -> Array:
    """Equal shares of the skills whose sigmoid is above 1/2, with the gradient of the sigmoids.

    A row that chooses nobody has its plain shares; the published code divides 0 by 1e-12 there.
    """
    sigmoid_E = jax.nn.sigmoid(logits_E)
    chosen_E = sigmoid_E + jax.lax.stop_gradient(jnp.round(sigmoid_E) - sigmoid_E)
    count = jnp.sum(chosen_E, axis=-1, keepdims=True)
    some = count > 0.5
    return jnp.where(some, chosen_E / jnp.where(some, count, 1.0), sigmoid_share(logits_E))


def corrected_sigmoid(logits_SE: Array) -> Array:
    """Sigmoids times sqrt(S / E), which do not add up to 1 ("average correction")."""
    heads, skills = logits_SE.shape[-2:]
    return jax.nn.sigmoid(logits_SE) * math.sqrt(heads / skills)


def last_shared(logits_E: Array) -> Array:
    """Shares where the last skill is everybody's: in place of its sigmoid stands 1."""
    sigmoid_E = jax.nn.sigmoid(logits_E).at[..., -1].set(1.0)
    return sigmoid_E / jnp.sum(sigmoid_E, axis=-1, keepdims=True)


SHARES: dict[str, SkillShares] = {
    "sigmoid": sigmoid_share,
    "length": unit_length,
    "rounded": rounded_share,
    "corrected": corrected_sigmoid,
    "last_shared": last_shared,
}


def relaxed_bernoulli(logits_E: Array, uniform_E: Array) -> Array:
    """Logits whose sigmoids are relaxed Bernoulli samples at temperature 1 (arXiv:1611.00712).

    uniform_E: numbers between 0 and 1, both exclusive.
    """
    return logits_E + jnp.log(uniform_E) - jnp.log1p(-uniform_E)


def logistic_noise(logits_NE: Array, key: Array) -> Array:
    """`relaxed_bernoulli` with numbers of its own."""
    least = jnp.finfo(jnp.float32).tiny
    # The largest float32 below 1, so that its complement has a logarithm.
    drawn_NE = jax.random.uniform(key, logits_NE.shape, minval=least, maxval=1 - 2.0**-24)
    return relaxed_bernoulli(logits_NE, drawn_NE)


def shares_by_head(heads: int, share: SkillShares = sigmoid_share) -> Select:
    """All skills of all heads in their own order, each head's row normalised by `share`.

    Logits are [N, S * E], head by head, and so are the weights; k is S * E.
    """

    def select(logits_NG: Array, k: int) -> Selected:
        rows = logits_NG.shape[0]
        logits_NSE = logits_NG.reshape(rows, heads, k // heads)
        weights_NG = share(logits_NSE).reshape(rows, k)
        experts_NG = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), logits_NG.shape)
        probs_NG = sigmoid_share(logits_NSE).reshape(rows, k) / heads
        return Selected(experts_NG, weights_NG, probs_NG)

    return select


def by_head(x_ND: Array, a_DR: Array, b_RO: Array, gates_NG: Array, heads: int) -> Array:
    """x (sum of gate A_e) (sum of gate B_e) with gates of each head's own, [N, O].

    A bank of E skills as in `ops.lowrank`; gates_NG [N, S * E], head by head. Head q's gates mix
    rows q D/S .. of A and columns q O/S .. of B; with one head it is `lowrank.by_factor`. S divides
    D and O.
    """
    n, ranks = x_ND.shape[0], a_DR.shape[1]
    gates_SNE = jnp.swapaxes(gates_NG.astype(x_ND.dtype).reshape(n, heads, -1), 0, 1)
    skills = gates_SNE.shape[-1]
    # Heads first, as a batched product has them: any other order is transposed, forth and back.
    x_SNd = jnp.swapaxes(x_ND.reshape(n, heads, -1), 0, 1)
    # x first, then the gates: mixed factors would be a pair of matrices for every token.
    h_SNEr = (x_SNd @ a_DR.reshape(heads, -1, ranks)).reshape(heads, n, skills, -1)
    mixed_Nr = jnp.sum(h_SNEr * gates_SNE[..., None], axis=(0, 2))
    spread_SNR = (mixed_Nr[:, None] * gates_SNE[..., None]).reshape(heads, n, ranks)
    y_SNo = spread_SNR @ jnp.swapaxes(b_RO.reshape(ranks, heads, -1), 0, 1)
    return jnp.swapaxes(y_SNo, 0, 1).reshape(n, b_RO.shape[1])


def mixed_factors(a_DR: Array, b_RO: Array, gates_SE: Array) -> tuple[Array, Array]:
    """The pair [D, r], [r, O] that `by_head` applies under constant gates; exact, float32."""
    heads, skills = gates_SE.shape
    a_SdEr = a_DR.reshape(heads, a_DR.shape[0] // heads, skills, -1)
    b_ErSo = b_RO.reshape(skills, -1, heads, b_RO.shape[1] // heads)
    a_Sdr = jnp.einsum("sder,se->sdr", a_SdEr, gates_SE, precision=EXACT)
    b_rSo = jnp.einsum("erso,se->rso", b_ErSo, gates_SE, precision=EXACT)
    return a_Sdr.reshape(a_DR.shape[0], -1), b_rSo.reshape(b_rSo.shape[0], -1)


def head_overlap(a_DR: Array, heads: int, skills: int) -> Array:
    """How alike the heads of A are: mean squared cosine between heads, less that with themselves.

    0 where all are at right angles. MHR's orthogonality regulariser, scalar float32.
    """
    a_SdEr = a_DR.reshape(heads, a_DR.shape[0] // heads, skills, -1)
    length_S1Er = jnp.sqrt(jnp.sum(a_SdEr**2, axis=1, keepdims=True))
    unit_SdEr = a_SdEr / jnp.maximum(length_S1Er, SHORTEST)
    cosine_ErSQ = jnp.einsum("sder,qder->ersq", unit_SdEr, unit_SdEr, precision=EXACT)
    return jnp.mean(cosine_ErSQ**2) - 1.0 / heads


def buffet_penalty(logits_JE: Array) -> Array:
    """The negative logarithm of an Indian buffet prior of tasks' skills, up to a constant.

    A skill is had where its sigmoid exceeds 1/2; gradients pass through as the sigmoid's. Columns
    that nobody has do not count; how many columns are equal has no gradient. arXiv:2202.13914,
    section 2.2.
    """
    soft_JE = jax.nn.sigmoid(logits_JE)
    hard_JE = (soft_JE > 0.5).astype(jnp.float32)
    had_JE = soft_JE + jax.lax.stop_gradient(hard_JE - soft_JE)
    count_E = jnp.sum(had_JE, axis=0)
    used_E = jnp.sum(hard_JE, axis=0) > 0
    # An unused column must reach neither gamma function: their derivative at 0 is infinite.
    safe_E = jnp.where(used_E, count_E, 1.0)
    terms_E = gammaln(logits_JE.shape[0] - safe_E + 1) + gammaln(safe_E)
    return _equal_columns(hard_JE) - jnp.sum(jnp.where(used_E, terms_E, 0.0))


def _equal_columns(hard_JE: Array) -> Array:
    """Sum over different columns of the logarithm of (how often each stands there)!"""
    same_EE = jnp.all(hard_JE[:, :, None] == hard_JE[:, None, :], axis=0)
    times_E = jnp.sum(same_EE, axis=1).astype(jnp.float32)
    # Every one of K equal columns brings a K-th of their common term.
    return jnp.sum(gammaln(times_E + 1) / times_E)
