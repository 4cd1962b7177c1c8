"""Statistics of one MoE layer on calibration data: what each expert does for one task.

All of them come from the k chosen experts' outputs of each token, in one pass. Sums of one batch
are float32 on the device; totals are float64 on the host. Padded tokens count nowhere.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.ops.routing import OUTSIDE, Routing

Sums = Any  # float32 on the device for a batch, float64 NumPy on the host for totals


class Usage(NamedTuple):
    """Sums over tokens; `g` is a choice's weight (0 where not chosen), `y` an expert's output.

    tokens []: tokens that are not padding.
    choices []: choices that went to an expert.
    count_E, first_E: tokens that chose the expert; that chose it first.
    first_prob_E: sum of the router's probability over the tokens that chose it first.
    gate_E, gate2_E: sums of g and of g squared.
    norm_E, norm2_E, gated_norm_E: sums of |y|, of |y| squared and of g |y|.
    peak_E: the largest |y|, the only entry that is no sum.
    chosen_EE: tokens that chose both.   logits_EE: sum of the products of two experts' logits.
    output_ED, gated_output_ED: sums of y and of g squared times y.
    gates_EE: sum of g_e g_f.   energy_EE: sum of g_e g_f <y_e, y_f>.
    cross_EED: [e, f] holds the sum of g_e g_f y_f.
    """

    tokens: Sums
    choices: Sums
    count_E: Sums
    first_E: Sums
    first_prob_E: Sums
    gate_E: Sums
    gate2_E: Sums
    norm_E: Sums
    norm2_E: Sums
    gated_norm_E: Sums
    peak_E: Sums
    chosen_EE: Sums
    logits_EE: Sums
    output_ED: Sums
    gated_output_ED: Sums
    gates_EE: Sums
    energy_EE: Sums
    cross_EED: Sums


# Sums that are taken from each other later: TF32 or bfloat16 products would leave noise of them.
exactly = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def observe(routing: Routing, outputs_NKD: Array) -> Usage:
    """One batch's sums, float32; `outputs_NKD` are the chosen experts' outputs before the weight.

    Rows of choices that went nowhere (-1) and of masked tokens may hold any value.
    """
    e = routing.probs_NE.shape[1]
    chosen_NK = (routing.experts_NK >= 0) & routing.mask_N[:, None]
    g_NK = jnp.where(chosen_NK, routing.weights_NK, 0.0)
    # Chosen, not multiplied by 0: such rows may be NaN.
    y_NKD = jnp.where(chosen_NK[..., None], outputs_NKD.astype(jnp.float32), 0.0)
    hot_NKE = (routing.experts_NK[..., None] == jnp.arange(e)) & chosen_NK[..., None]
    hot_NKE = hot_NKE.astype(jnp.float32)
    norm_NK = jnp.linalg.norm(y_NKD, axis=-1)
    gy_NKD = g_NK[..., None] * y_NKD

    def per_expert(value_NK: Array) -> Array:
        return exactly("nke,nk->e", hot_NKE, value_NK)

    gates_NE = exactly("nke,nk->ne", hot_NKE, g_NK)
    first_NE, chosen_NE = hot_NKE[:, 0], hot_NKE.sum(1)
    real_N1 = routing.mask_N[:, None]
    # Outside of a support logits are huge, and nothing is known of them.
    known_NE = real_N1 & (routing.logits_NE > OUTSIDE)
    logits_NE = jnp.where(known_NE, routing.logits_NE, 0.0)
    inner_NKL = exactly("nkd,nld->nkl", gy_NKD, gy_NKD)
    return Usage(
        tokens=jnp.sum(routing.mask_N, dtype=jnp.float32),
        choices=jnp.sum(chosen_NK, dtype=jnp.float32),
        count_E=hot_NKE.sum((0, 1)),
        first_E=first_NE.sum(0),
        first_prob_E=jnp.sum(jnp.where(real_N1, routing.probs_NE, 0.0) * first_NE, axis=0),
        gate_E=per_expert(g_NK),
        gate2_E=per_expert(g_NK**2),
        norm_E=per_expert(norm_NK),
        norm2_E=per_expert(norm_NK**2),
        gated_norm_E=per_expert(g_NK * norm_NK),
        peak_E=jnp.max(hot_NKE * norm_NK[..., None], axis=(0, 1), initial=0.0),
        chosen_EE=chosen_NE.T @ chosen_NE,
        logits_EE=exactly("ne,nf->ef", logits_NE, logits_NE),
        output_ED=exactly("nke,nkd->ed", hot_NKE, y_NKD),
        gated_output_ED=exactly("nke,nkd->ed", hot_NKE, g_NK[..., None] * gy_NKD),
        gates_EE=gates_NE.T @ gates_NE,
        energy_EE=exactly("nke,nkl,nlf->ef", hot_NKE, inner_NKL, hot_NKE),
        cross_EED=_cross(routing.experts_NK, chosen_NK, g_NK, gy_NKD, e),
    )


def _cross(experts_NK: Array, chosen_NK: Array, g_NK: Array, gy_NKD: Array, e: int) -> Array:
    """Sums of g_e g_f y_f by pair (e, f), a segment sum over the k*k pairs of each token."""
    d = gy_NKD.shape[-1]
    pair_NKK = experts_NK[:, :, None] * e + experts_NK[:, None, :]
    both_NKK = chosen_NK[:, :, None] & chosen_NK[:, None, :]
    # Pairs with a choice that went nowhere have a segment of their own, which is cut off.
    pair_NKK = jnp.where(both_NKK, pair_NKK, e * e)
    terms_NKKD = g_NK[:, :, None, None] * gy_NKD[:, None, :, :]
    sums = jax.ops.segment_sum(terms_NKKD.reshape(-1, d), pair_NKK.reshape(-1), e * e + 1)
    return sums[:-1].reshape(e, e, d)


class Moments(NamedTuple):
    """Sums over the choices of each expert, weighted with g squared; x is what the layer reads.

    input_ED: of x.   inputs_EDD: of x x^T.   both_EDD: of x y^T, inputs first.
    """

    input_ED: Sums
    inputs_EDD: Sums
    both_EDD: Sums


def observe_inputs(routing: Routing, x_ND: Array, outputs_NKD: Array) -> Moments:
    """One batch's moments, float32; arguments as for `observe`."""
    chosen_NK = (routing.experts_NK >= 0) & routing.mask_N[:, None]
    g2_NK = jnp.where(chosen_NK, routing.weights_NK, 0.0) ** 2
    y_NKD = jnp.where(chosen_NK[..., None], outputs_NKD.astype(jnp.float32), 0.0)
    x_ND = jnp.where(routing.mask_N[:, None], x_ND.astype(jnp.float32), 0.0)

    def of_expert(expert: Array) -> Moments:
        mine_NK = jnp.where(routing.experts_NK == expert, g2_NK, 0.0)
        weighed_ND = mine_NK.sum(1)[:, None] * x_ND
        y_ND = jnp.sum(mine_NK[..., None] * y_NKD, axis=1)
        return Moments(
            weighed_ND.sum(0),
            exactly("nd,nf->df", weighed_ND, x_ND),
            exactly("nd,nf->df", x_ND, y_ND),
        )

    # One expert after the other: all of them at once would hold [N, E, D].
    return jax.lax.map(of_expert, jnp.arange(routing.probs_NE.shape[1]))


def add(total: Usage | None, part: Usage) -> Usage:
    """Add one batch's sums to the totals, on the host in float64."""
    host = Usage(*(np.asarray(value, np.float64) for value in part))
    if total is None:
        return host
    peak_E = np.maximum(total.peak_E, host.peak_E)
    return Usage(*map(np.add, total, host))._replace(peak_E=peak_E)


def add_moments(total: Moments | None, part: Moments) -> Moments:
    """The same for moments."""
    host = Moments(*(np.asarray(value, np.float64) for value in part))
    return host if total is None else Moments(*map(np.add, total, host))


def output_variance(usage: Usage) -> np.ndarray:
    """Variance of each expert's output about its mean, summed over features, float64 [E]."""
    count_E = np.maximum(usage.count_E, 1.0)
    mean_ED = usage.output_ED / count_E[:, None]
    return np.maximum(usage.norm2_E / count_E - np.sum(mean_ED**2, axis=1), 0.0)


def mean_outputs(usage: Usage) -> np.ndarray:
    """Mean output of each expert over the tokens that chose it, float64 [E, D].

    An expert seen on fewer than 30 tokens is drawn towards the mean over all experts, one never
    seen gets it entirely.
    """
    return _means(usage.output_ED, usage.count_E, usage.count_E)


def weighted_mean_outputs(usage: Usage) -> np.ndarray:
    """As `mean_outputs`, weighted with g squared.

    This constant minimises the layer's squared error when the expert is replaced by it.
    """
    return _means(usage.gated_output_ED, usage.gate2_E, usage.count_E)


RELIABLE = 30  # tokens below which an expert's own mean is not trusted alone


def _means(sums_ED: np.ndarray, weight_E: np.ndarray, count_E: np.ndarray) -> np.ndarray:
    common_D = sums_ED.sum(0) / max(float(weight_E.sum()), 1e-30)
    # An expert that nobody chose has no trust either, so its quotient does not matter.
    own_ED = sums_ED / np.maximum(weight_E, 1e-30)[:, None]
    trust_E1 = np.minimum(count_E / RELIABLE, 1.0)[:, None]
    return trust_E1 * own_ED + (1.0 - trust_E1) * common_D


def removal_errors(usage: Usage, constants_ED: np.ndarray) -> np.ndarray:
    """M [E, E] whose sub-matrix sum is the squared layer error of replacing those experts.

    M_ef = sum of g_e g_f <y_e - c_e, y_f - c_f> with c the constants that replace the outputs:
    the error of a subset B is exactly the sum of M over B x B (with the router kept whole).
    """
    mixed_EE = np.einsum("efd,ed->ef", usage.cross_EED, constants_ED)
    constant_EE = usage.gates_EE * (constants_ED @ constants_ED.T)
    return np.asarray(usage.energy_EE - mixed_EE - mixed_EE.T + constant_EE)
