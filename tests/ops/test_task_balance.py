"""Losses of tasks and experts: the oracle, known tables, where formulas could divide by zero."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops import balance
from moezoo.ops.routing import route
from tests.ops import oracle

N, E, J, K = 30, 5, 3, 2
LOSSES = {
    "information": lambda r, t: balance.mutual_information_loss(r, t, J),
    "smoothed": lambda r, t: balance.mutual_information_loss_smoothed(r, t, J),
    "few": lambda r, t: balance.few_experts_loss(r, t, J, 2, 1e-2),
}


@jax.jit
def everything(logits_NE, task_N, mask_N):
    routing = route(logits_NE, k=K, mask_N=mask_N)
    sums_JE = balance.task_expert_sums(routing, task_N, J)
    return sums_JE, {name: loss(routing, task_N) for name, loss in LOSSES.items()}


@given(seed=st.integers(0, 2**31 - 1))
def test_against_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits_NE, task_N = 3 * rng.normal(size=(N, E)), rng.integers(0, J, N)
    mask_N = rng.random(N) > 0.3
    spoiled_NE = np.where(mask_N[:, None], logits_NE, np.nan)
    sums_JE, losses = everything(spoiled_NE, task_N, mask_N)
    expected_JE, mean_JE = np.zeros((J, E)), np.zeros((J, E))
    for task in range(J):
        probs = [oracle.softmax(row) for row in logits_NE[mask_N & (task_N == task)]]
        if probs:
            expected_JE[task] = np.sum(probs, axis=0)
            mean_JE[task] = np.mean(probs, axis=0) + 1e-2
    np.testing.assert_allclose(sums_JE, expected_JE, rtol=1e-4, atol=1e-5)
    parts = [expected_JE.sum(axis=1), expected_JE.sum(axis=0)]
    information = sum(map(oracle.entropy, parts)) - oracle.entropy(expected_JE)
    np.testing.assert_allclose(losses["information"], -information, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(losses["smoothed"], -information, atol=5e-3)
    few = np.sum(np.sort(mean_JE.sum(axis=0))[:-2] ** 2)
    np.testing.assert_allclose(losses["few"], few, rtol=1e-4)


@pytest.mark.slow
def test_known_tables() -> None:
    information = balance.mutual_information
    assert information(jnp.outer(jnp.arange(1.0, 4), jnp.arange(2.0, 6))) == pytest.approx(
        0, abs=1e-6
    )
    assert information(7.0 * jnp.eye(4)) == pytest.approx(np.log(4), rel=1e-6)
    assert information(jnp.zeros((3, 4))) == 0.0


@pytest.mark.slow
def test_parts_of_a_batch_add_up() -> None:
    rng = np.random.default_rng(0)
    logits_NE, task_N = jnp.asarray(rng.normal(size=(N, E))), jnp.asarray(rng.integers(0, J, N))

    def sums(part):
        return balance.task_expert_sums(route(logits_NE[part], k=K), task_N[part], J, 1e-4)

    halves = sums(slice(0, 12)) + sums(slice(12, N))
    np.testing.assert_allclose(halves, sums(slice(0, N)), rtol=1e-5)


SITUATIONS = {
    "balanced": (np.zeros((N, E)), np.ones(N, bool)),
    "each task its expert": (1e3 * np.eye(E)[np.arange(N) % J], np.ones(N, bool)),
    "collapsed": (1e3 * np.eye(E)[np.zeros(N, int)], np.ones(N, bool)),
    "all padded": (np.zeros((N, E)), np.zeros(N, bool)),
    "no token": (np.zeros((0, E)), np.zeros(0, bool)),
}


@pytest.mark.slow
@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_values_and_gradients_are_finite(situation: str) -> None:
    logits_NE, mask_N = SITUATIONS[situation]
    task_N = np.arange(len(mask_N)) % J

    def losses(logits_NE):
        values = everything(logits_NE, task_N, mask_N)[1]
        return jnp.stack([values[name] for name in LOSSES])

    values = losses(jnp.asarray(logits_NE, jnp.float32))
    slopes = jax.jacrev(losses)(jnp.asarray(logits_NE, jnp.float32))
    assert values.dtype == jnp.float32
    assert np.isfinite(values).all() and np.isfinite(slopes).all()
    if not mask_N.any():
        np.testing.assert_array_equal(values, 0.0)
    if situation == "each task its expert":
        assert values[0] == pytest.approx(-np.log(J), rel=1e-5)
