"""Balance losses and usage against the oracle, and where formulas could divide by zero."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops import balance
from moezoo.ops.routing import constant_noise, route
from moezoo.ops.selection import Selection, biased, sigmoid_weights
from tests.ops import oracle

N, E, K, STD = 40, 6, 2, 3.0
LOSSES = {
    "importance": balance.importance_loss,
    "importance_vmoe": lambda r: balance.importance_loss(
        r, balance.prob_sums, balance.cv_squared_population
    ),
    "load": balance.load_loss,
    "load_mixed": balance.load_loss_mixed_spaces,
    "load_vmoe": lambda r: balance.load_loss(
        r, balance.smooth_load_one_threshold, balance.cv_squared_population
    ),
    "switch": balance.switch_loss,
    "switch_of_choices": balance.switch_loss_of_choices,
    "switch_smoothed": lambda r: balance.switch_loss_of_choices(r, 1e-2),
    "z": balance.z_loss,
    "z_smoothed": lambda r: balance.z_loss(r, 1e-2),
    "entropy": balance.usage_entropy_loss,
    "entropy_of_choices": lambda r: balance.usage_entropy_loss(r, balance.choice_counts),
}


@jax.jit
def noisy_route(logits_NE, eps_NE, mask_N):
    return route(logits_NE, k=K, noise=constant_noise(STD), eps_NE=eps_NE, mask_N=mask_N)


@jax.jit
def amounts(routing):
    return {
        "gate_sums": balance.gate_sums(routing),
        "counts": balance.choice_counts(routing),
        "prob_sums": balance.prob_sums(routing),
        "smooth_load": balance.smooth_load(routing),
        **{name: loss(routing) for name, loss in LOSSES.items()},
    }


@pytest.mark.slow
@given(seed=st.integers(0, 2**31 - 1))
def test_against_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits_NE, eps_NE = rng.normal(size=(2, N, E))
    mask_N = rng.random(N) > 0.3
    got = amounts(noisy_route(logits_NE, eps_NE, mask_N))
    clean_NE = logits_NE[mask_N]
    noisy_NE = (logits_NE + STD / E * eps_NE)[mask_N]
    chosen = [oracle.choose("softmax_then_top_k", row, K) for row in noisy_NE]
    importance_E = oracle.importance(chosen, E)
    load_E = oracle.load(clean_NE, noisy_NE, STD / E, K)
    probs_NE = np.stack([oracle.softmax(row) for row in noisy_NE])
    clean_probs_NE = np.stack([oracle.softmax(row) for row in clean_NE])
    counts_E = np.bincount([e for c in chosen for e in c], minlength=E)
    first_E = np.bincount([next(iter(c)) for c in chosen], minlength=E)
    z_N = np.log(np.sum(np.exp(clean_NE), axis=1))
    prob_sums_E = clean_probs_NE.sum(axis=0)
    expected = {
        "gate_sums": importance_E,
        "counts": counts_E,
        "prob_sums": prob_sums_E,
        "smooth_load": load_E,
        "importance": oracle.cv_squared(importance_E),
        "load": oracle.cv_squared(load_E),
        "importance_vmoe": (prob_sums_E.std() / prob_sums_E.mean()) ** 2,
        "switch": E * np.sum(first_E / len(chosen) * probs_NE.mean(axis=0)),
        "switch_of_choices": E * np.sum(counts_E / counts_E.sum() * probs_NE.mean(axis=0)),
        "switch_smoothed": E
        * np.sum(counts_E / counts_E.sum() * (probs_NE.mean(axis=0) + 1e-2))
        / (1 + E * 1e-2),
        "z": np.mean(z_N**2),
        "z_smoothed": np.mean(np.log(np.exp(z_N) + 1e-2) ** 2),
        "entropy": np.log(E) - oracle.entropy(prob_sums_E),
        "entropy_of_choices": np.log(E) - oracle.entropy(counts_E),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_the_load_adds_up_to_k_experts_per_token_only_in_the_sound_form() -> None:
    rng = np.random.default_rng(0)
    logits_NE, eps_NE = rng.normal(size=(2, 4000, E))
    routing = noisy_route(logits_NE, eps_NE, np.ones(4000, bool))
    assert np.sum(balance.smooth_load(routing)) / 4000 == pytest.approx(K, rel=0.02)
    mixed = np.sum(balance.smooth_load_mixed_spaces(routing)) / 4000
    assert abs(mixed - K) > 0.2


SITUATIONS = {
    "balanced": (np.eye(E)[np.arange(N) % E] * 0.0, np.ones(N, bool)),
    "collapsed": (np.eye(E)[np.zeros(N, int)] * 1e3, np.ones(N, bool)),
    "all padded": (np.zeros((N, E)), np.zeros(N, bool)),
    "no token": (np.zeros((0, E)), np.zeros(0, bool)),
}


@partial(jax.jit, static_argnames="std")
def values_and_slopes(logits_NE, mask_N, std: float):
    def losses(logits_NE):
        eps_NE = jnp.ones_like(logits_NE)
        routing = route(logits_NE, k=K, noise=constant_noise(std), eps_NE=eps_NE, mask_N=mask_N)
        return jnp.stack([loss(routing) for loss in LOSSES.values()])

    return losses(logits_NE), jax.jacrev(losses)(logits_NE)


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.0, 1.0])
@pytest.mark.parametrize("situation", list(SITUATIONS))
def test_values_and_gradients_are_finite(situation: str, std: float) -> None:
    logits_NE, mask_N = SITUATIONS[situation]
    values, slopes = values_and_slopes(jnp.asarray(logits_NE, jnp.float32), mask_N, std)
    assert values.dtype == jnp.float32
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()
    if not mask_N.any():
        np.testing.assert_array_equal(values, 0.0)


@pytest.mark.slow
def test_even_use_costs_nothing_and_uneven_use_does() -> None:
    even_NE = jnp.asarray(np.eye(E)[np.arange(36) % E] * 3.0)
    uneven_NE = jnp.asarray(np.eye(E)[np.minimum(np.arange(36) % E, 2)] * 3.0)
    even, uneven = (route(logits_NE, k=1) for logits_NE in (even_NE, uneven_NE))
    at_even, at_uneven = amounts(even), amounts(uneven)
    for name in ("importance", "load", "importance_vmoe", "entropy", "entropy_of_choices"):
        assert at_even[name] == pytest.approx(0.0, abs=1e-6)
        assert at_uneven[name] > 0.1
    assert at_even["switch"] == pytest.approx(1.0, rel=1e-5)
    assert at_uneven["switch"] > 1.2


@pytest.mark.slow
def test_one_expert_cannot_be_uneven() -> None:
    routing = route(jnp.ones((5, 1)), k=1)
    assert balance.importance_loss(routing) == 0.0
    assert balance.load_loss(routing) == 0.0


@pytest.mark.slow
def test_losses_of_one_task_see_its_tokens_only() -> None:
    rng = np.random.default_rng(1)
    logits_NE, task_N = rng.normal(size=(N, E)), np.arange(N) % 2
    whole = route(jnp.asarray(logits_NE), k=K)

    part = route(jnp.asarray(logits_NE[task_N == 1]), k=K)
    narrow = whole._replace(mask_N=whole.mask_N & (task_N == 1))
    of_part, of_whole = amounts(part), amounts(narrow)
    for name in LOSSES:
        assert of_whole[name] == pytest.approx(float(of_part[name]), rel=1e-5), name


def test_the_bias_goes_against_the_counts_by_a_fixed_step() -> None:
    bias_E = balance.updated_bias(jnp.zeros(4), jnp.array([5, 3, 4, 4]), 0.1)
    np.testing.assert_allclose(bias_E, [-0.1, 0.1, 0.0, 0.0])
    np.testing.assert_array_equal(balance.updated_bias(bias_E, jnp.zeros(4, int), 0.1), bias_E)


@pytest.mark.parametrize("experts", [7, 14, 41, 60])
def test_even_counts_move_no_bias_in_a_compiled_step_either(experts: int) -> None:
    # Compiled, a mean of floats is a product with 1 / E, which few numbers of experts survive.
    move = jax.jit(lambda counts_E: balance.updated_bias(jnp.zeros(experts), counts_E, 0.1))
    for each in (3, 7, 1000):
        counts_E = jnp.full(experts, each, jnp.int32)
        np.testing.assert_array_equal(move(counts_E), jnp.zeros(experts))
        more_E = counts_E.at[0].add(1)
        np.testing.assert_allclose(move(more_E), [-0.1] + [0.1] * (experts - 1), rtol=1e-6)


def test_a_biased_choice_becomes_even() -> None:
    logits_NE = jnp.asarray(np.random.default_rng(2).normal(size=(400, E)) + np.arange(E))

    def step(bias_E, rate):
        routing = route(logits_NE, k=K, select=Selection(sigmoid_weights, biased(bias_E)))
        counts_E = balance.choice_counts(routing)
        return balance.updated_bias(bias_E, counts_E, rate), counts_E

    rates = jnp.asarray([1e-2] * 60 + [1e-3] * 90)
    _, counts = jax.jit(lambda: jax.lax.scan(step, jnp.zeros(E), rates))()
    assert counts[0].max() > 2 * 400 * K / E
    assert counts[-1].max() < 1.15 * 400 * K / E
