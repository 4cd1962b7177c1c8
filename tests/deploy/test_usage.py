"""Calibration statistics against sums written out token by token."""

from __future__ import annotations

from itertools import combinations

import jax
import numpy as np
import pytest

from moezoo.deploy import usage
from moezoo.ops.routing import OUTSIDE, Routing

N, E, K, D = 48, 5, 3, 7
observe = jax.jit(usage.observe)


def example(seed: int = 0) -> tuple[Routing, np.ndarray]:
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype(np.int32)
    weights = rng.uniform(0.05, 1, (N, K)).astype(np.float32)
    mask = rng.uniform(size=N) < 0.9
    experts[:3, 2] = -1
    weights[experts < 0] = 0
    zeros, logits = np.zeros((N, E), np.float32), rng.normal(size=(N, E)).astype(np.float32)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    logits[:, E - 1] = np.where(experts.max(1) < E - 1, OUTSIDE, logits[:, E - 1])
    nothing = np.zeros((1, 1), np.float32)
    routing = Routing(experts, weights, probs, logits, zeros, nothing, mask)
    return routing, rng.normal(size=(N, K, D)).astype(np.float32)


def by_hand(routing: Routing, y_NKD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights [N, E] and outputs [N, E, D], zero where an expert was not chosen."""
    g, y = np.zeros((N, E)), np.zeros((N, E, D))
    for n in range(N):
        for k in range(K):
            e = routing.experts_NK[n, k]
            if e >= 0 and routing.mask_N[n]:
                g[n, e], y[n, e] = routing.weights_NK[n, k], y_NKD[n, k]
    return g, y


def test_sums_equal_the_written_out_ones() -> None:
    routing, y_NKD = example()
    y_NKD[~routing.mask_N] = np.nan  # padding may hold anything
    found = usage.add(None, observe(routing, y_NKD))
    g, y = by_hand(routing, y_NKD)
    norm = np.linalg.norm(y, axis=-1)
    first = routing.experts_NK[routing.mask_N, 0]
    probs = routing.probs_NE[routing.mask_N]
    logits = np.where(routing.logits_NE == OUTSIDE, 0, routing.logits_NE)[routing.mask_N]
    expected = usage.Usage(
        tokens=routing.mask_N.sum(),
        choices=(g > 0).sum(),
        count_E=(g > 0).sum(0),
        first_E=np.bincount(first[first >= 0], minlength=E),
        first_prob_E=[probs[first == e, e].sum() for e in range(E)],
        gate_E=g.sum(0),
        gate2_E=(g**2).sum(0),
        norm_E=norm.sum(0),
        norm2_E=(norm**2).sum(0),
        gated_norm_E=(g * norm).sum(0),
        peak_E=norm.max(0),
        chosen_EE=(g > 0).astype(float).T @ (g > 0),
        logits_EE=logits.T @ logits,
        output_ED=y.sum(0),
        gated_output_ED=np.einsum("ne,ned->ed", g**2, y),
        gates_EE=g.T @ g,
        energy_EE=np.einsum("ne,nf,ned,nfd->ef", g, g, y, y),
        cross_EED=np.einsum("ne,nf,nfd->efd", g, g, y),
    )
    for name, a, b in zip(usage.Usage._fields, found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)


def test_batches_add_up_in_any_order() -> None:
    parts = [observe(*example(seed)) for seed in range(4)]
    forward = backward = None
    for part in parts:
        forward = usage.add(forward, part)
    for part in reversed(parts):
        backward = usage.add(backward, part)
    assert forward is not None and backward is not None
    for a, b in zip(forward, backward, strict=True):
        assert np.asarray(a).dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("means", [usage.mean_outputs, usage.weighted_mean_outputs])
def test_error_of_any_subset_is_a_sub_matrix_sum(means) -> None:
    routing, y_NKD = example(3)
    g, y = by_hand(routing, y_NKD)
    total = usage.add(None, observe(routing, y_NKD))
    constants = means(total)
    error_EE = usage.removal_errors(total, constants)
    for size in (1, 2, 4):
        for removed in combinations(range(E), size):
            index = list(removed)
            change = np.einsum("ne,ned->nd", g[:, index], (y - constants)[:, index])
            found = error_EE[np.ix_(index, index)].sum()
            np.testing.assert_allclose(found, (change**2).sum(), rtol=1e-4, atol=1e-3)


def test_weighted_mean_is_the_best_constant_for_one_expert() -> None:
    routing, y_NKD = example(5)
    total = usage.add(None, observe(routing, y_NKD))
    trusted = total._replace(count_E=np.full(E, 1e9))  # no drawing towards the common mean
    best = usage.weighted_mean_outputs(trusted)
    least = np.diagonal(usage.removal_errors(total, best))
    for other in (usage.mean_outputs(trusted), best + 0.05, np.zeros_like(best)):
        assert np.all(np.diagonal(usage.removal_errors(total, other)) >= least - 1e-6)


def test_rarely_seen_expert_leans_on_the_common_mean() -> None:
    routing, y_NKD = example(1)
    total = usage.add(None, observe(routing, y_NKD))
    output_ED, count_E = np.array(total.output_ED), np.array(total.count_E)
    output_ED[0], count_E[0], count_E[1:] = 0.0, 0.0, 100.0
    means = usage.mean_outputs(total._replace(output_ED=output_ED, count_E=count_E))
    np.testing.assert_allclose(means[0], output_ED.sum(0) / count_E.sum())
    np.testing.assert_allclose(means[1], output_ED[1] / 100.0)
