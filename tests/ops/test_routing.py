"""Routing: selections, noise, padding, supports."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops.routing import (
    SELECTIONS,
    constant_noise,
    dense_weights,
    drop_small_weights,
    expert_range,
    learned_noise,
    map_rows,
    no_noise,
    ordered_weights,
    pick,
    route,
    softmax_then_top_k_renormalised,
    top_k_then_softmax,
)
from moezoo.ops.selection import (
    Selection,
    biased,
    sampled_after,
    sigmoid_share,
    sigmoid_weights,
    softmax_weights,
)
from moezoo.ops.skills import shares_by_head
from tests.ops import oracle
from tests.ops.cases import SHAPES, Shape, arrays, problem, router


@pytest.mark.slow
@pytest.mark.parametrize("select", list(SELECTIONS))
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 2**31 - 1))
def test_selections_against_the_oracle(select: str, shape: Shape, seed: int) -> None:
    p = problem(shape, seed, padded=0.3)
    routing = router(select, shape.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    assert routing.experts_NK.shape == routing.weights_NK.shape == (shape.n, shape.k)
    assert routing.experts_NK.dtype == jnp.int32
    for n in range(shape.n):
        if p.mask_N[n]:
            chosen = oracle.choose(select, p.logits_NE[n], shape.k)
            assert list(routing.experts_NK[n]) == list(chosen)
            np.testing.assert_allclose(routing.weights_NK[n], list(chosen.values()), rtol=1e-5)
            probs = oracle.probs(select, p.logits_NE[n])
            np.testing.assert_allclose(routing.probs_NE[n], probs, rtol=1e-5)
        else:
            assert list(routing.experts_NK[n]) == [-1] * shape.k
            assert not routing.weights_NK[n].any() and not routing.probs_NE[n].any()


@pytest.mark.parametrize("select", list(SELECTIONS.values()))
def test_of_equal_scores_the_lowest_index_comes_first(select) -> None:
    logits_NE = jnp.array([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5])
    experts_NK = route(logits_NE, k=4, select=select).experts_NK
    np.testing.assert_array_equal(experts_NK, [[1, 2, 4, 0], [0, 1, 2, 3]])


@pytest.mark.slow
@pytest.mark.parametrize("select", list(SELECTIONS.values()))
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
def test_extreme_logits_have_finite_gradients(select, size: float) -> None:
    logits_NE = size * jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])

    def total(logits_NE):
        routing = route(logits_NE, k=2, select=select)
        return jnp.sum(routing.weights_NK**2)

    assert np.isfinite(total(logits_NE))
    assert np.isfinite(jax.grad(total)(logits_NE)).all()


def test_everything_is_float32() -> None:
    routing = route(jnp.zeros((3, 4), jnp.bfloat16), k=2, noise=constant_noise(1.0), key=KEY)
    for name in ("weights_NK", "probs_NE", "logits_NE", "noisy_NE", "noise_scale_NE"):
        assert getattr(routing, name).dtype == jnp.float32, name


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_experts(k: int) -> None:
    with pytest.raises(ValueError, match=f"k={k} of 4 experts"):
        route(jnp.zeros((3, 4)), k=k)


KEY = jax.random.key(0)


def test_constant_noise_has_the_stated_deviation() -> None:
    routing = route(jnp.zeros((4000, 5)), k=1, noise=constant_noise(2.0), key=KEY)
    np.testing.assert_allclose(routing.noise_scale_NE, 2.0 / 5, rtol=1e-6)
    np.testing.assert_allclose(np.std(routing.noisy_NE), 2.0 / 5, rtol=0.03)
    assert abs(np.mean(routing.noisy_NE)) < 0.01
    assert not routing.logits_NE.any()


def test_recorded_noise_is_used_as_it_is() -> None:
    rng = np.random.default_rng(0)
    logits_NE, raw_NE, eps_NE = arrays([rng.normal(size=(6, 4)) for _ in range(3)])
    constant = route(logits_NE, k=2, noise=constant_noise(0.5), eps_NE=eps_NE)
    np.testing.assert_allclose(constant.noisy_NE, logits_NE + 0.125 * eps_NE, rtol=1e-6)
    learned = route(logits_NE, k=2, noise=learned_noise(raw_NE), eps_NE=eps_NE)
    scale_NE = np.log1p(np.exp(raw_NE)) + 0.01
    np.testing.assert_allclose(learned.noise_scale_NE, scale_NE, rtol=1e-5)
    np.testing.assert_allclose(learned.noisy_NE, logits_NE + scale_NE * eps_NE, rtol=1e-5)
    best = np.argsort(-np.asarray(learned.noisy_NE), axis=1)[:, :2]
    np.testing.assert_array_equal(learned.experts_NK, best)


@pytest.mark.parametrize("noise", [no_noise, constant_noise(1.0), learned_noise(jnp.ones((6, 4)))])
def test_without_a_key_nothing_is_random(noise) -> None:
    logits_NE = jax.random.normal(KEY, (6, 4))
    routing = route(logits_NE, k=2, noise=noise)
    np.testing.assert_array_equal(routing.noisy_NE, logits_NE)
    assert not routing.noise_scale_NE.any() and routing.noise_scale_NE.shape == (6, 4)
    assert route(logits_NE, k=2, noise=noise, key=KEY).noise_scale_NE.shape == (6, 4)


def test_rows_of_several_decisions_are_changed_alike() -> None:
    one, two = (route(jax.random.normal(key, (5, 4)), k=2) for key in jax.random.split(KEY))
    both = map_rows(lambda *a: jnp.concatenate(a), one, two)
    assert both.mask_N.shape == (10,) and both.lot_NK is None
    for whole, first, last in zip(both[:7], one[:7], two[:7], strict=True):
        np.testing.assert_array_equal(whole[:5], first)
        np.testing.assert_array_equal(whole[5:], last)


@pytest.mark.parametrize("select", [softmax_then_top_k_renormalised, top_k_then_softmax])
def test_support_limits_the_choice(select) -> None:
    logits_NE = jax.random.normal(KEY, (8, 6))
    start_N = jnp.array([0, 0, 2, 2, 3, 3, 5, 5])
    support_NE = expert_range(start_N, 2, 6)  # the last two tokens have one expert only
    routing = route(
        logits_NE, k=2, select=select, noise=constant_noise(1.0), key=KEY, support_NE=support_NE
    )
    experts_NK = np.asarray(routing.experts_NK)
    offsets_NK = experts_NK - np.asarray(start_N)[:, None]
    assert set(offsets_NK[:6].ravel()) == {0, 1}
    np.testing.assert_array_equal(experts_NK[6:], [[5, -1], [5, -1]])
    np.testing.assert_array_equal(routing.weights_NK[6:], [[1, 0], [1, 0]])
    np.testing.assert_allclose(routing.weights_NK.sum(axis=1), 1.0, rtol=1e-6)
    assert not np.asarray(routing.probs_NE)[~np.asarray(support_NE)].any()
    np.testing.assert_allclose(routing.noise_scale_NE[:, 0], [0.5] * 6 + [1.0] * 2, rtol=1e-6)


def test_one_support_for_all_tokens() -> None:
    logits_NE = jax.random.normal(KEY, (8, 6))
    routing = route(logits_NE, k=2, support_NE=expert_range(jnp.asarray(1), 3, 6))
    inside = route(logits_NE[:, 1:4], k=2)
    np.testing.assert_array_equal(routing.experts_NK, inside.experts_NK + 1)
    np.testing.assert_allclose(routing.weights_NK, inside.weights_NK, rtol=1e-6)


def test_small_weights_are_dropped_but_stay_chosen() -> None:
    routing = route(jnp.log(jnp.array([[0.7, 0.2, 0.1]])), k=3)
    kept = drop_small_weights(routing, 0.15)
    np.testing.assert_allclose(kept.weights_NK, [[0.7, 0.2, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(kept.experts_NK, routing.experts_NK)


def test_pick_gives_zero_where_nothing_was_chosen() -> None:
    values_NE = jnp.array([[1.0, 2.0, 3.0]])
    np.testing.assert_array_equal(pick(values_NE, jnp.array([[2, -1, 0]])), [[3.0, 0.0, 1.0]])


def sampled(best: int, k: int, gumbel_NE, **rest):
    select = Selection(softmax_weights, sampled_after(best, gumbel_NE))
    return route(jnp.broadcast_to(LOGITS_E, gumbel_NE.shape), k=k, select=select, **rest)


LOGITS_E = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))


def test_sampled_experts_follow_the_softmax_and_weigh_what_it_says() -> None:
    gumbel_NE = jax.random.gumbel(KEY, (4000, 4))
    routing = sampled(0, 1, gumbel_NE)
    share_E = np.bincount(routing.experts_NK[:, 0], minlength=4) / 4000
    np.testing.assert_allclose(share_E, np.exp(LOGITS_E), atol=0.03)
    np.testing.assert_allclose(
        routing.weights_NK[:, 0], np.exp(LOGITS_E)[routing.experts_NK[:, 0]], rtol=1e-5
    )
    second = sampled(1, 2, gumbel_NE).experts_NK
    assert (second[:, 0] == 0).all()
    share_E = np.bincount(second[:, 1], minlength=4) / 4000
    np.testing.assert_allclose(share_E, [0.0, 0.5, 1 / 3, 1 / 6], atol=0.03)


@pytest.mark.parametrize("best", [0, 1, 2, 4])
def test_samples_are_distinct_and_inside_the_support(best: int) -> None:
    gumbel_NE = jax.random.gumbel(KEY, (50, 4))
    everyone = sampled(best, 4, gumbel_NE)
    np.testing.assert_array_equal(np.sort(everyone.experts_NK, axis=1), [[0, 1, 2, 3]] * 50)
    inside = sampled(best, 3, gumbel_NE, support_NE=jnp.array([False, True, False, True]))
    np.testing.assert_array_equal(np.sort(inside.experts_NK, axis=1), [[-1, 1, 3]] * 50)


def test_a_bias_moves_the_choice_and_no_weight() -> None:
    logits_NE = jax.random.normal(KEY, (30, 5))
    bias_E = jnp.array([0.0, 0.0, 3.0, -3.0, 0.0])
    select = Selection(sigmoid_weights, biased(bias_E), sigmoid_share)
    routing = route(logits_NE, k=2, select=select)
    assert (routing.experts_NK[:, 0] == 2).all() and not (routing.experts_NK == 3).any()
    expected = pick(jax.nn.sigmoid(logits_NE), routing.experts_NK)
    np.testing.assert_allclose(routing.weights_NK, expected, rtol=1e-6)
    np.testing.assert_allclose(routing.probs_NE.sum(axis=1), 1.0, rtol=1e-5)
    outside = route(logits_NE, k=2, select=select, support_NE=jnp.array([True, True] + [False] * 3))
    assert set(np.asarray(outside.experts_NK).ravel()) == {0, 1}
    slope = jax.grad(lambda b: _weight_sum(logits_NE, biased(b)))(bias_E)
    assert not slope.any(), "the bias is no parameter"


def _weight_sum(logits_NE, choose):
    select = Selection(sigmoid_weights, choose)
    return jnp.sum(route(logits_NE, k=2, select=select).weights_NK)


def test_dense_weights() -> None:
    routing = route(jax.random.normal(KEY, (6, 4)), k=2, mask_N=jnp.arange(6) > 1)
    weights_NE = dense_weights(routing, 4)
    np.testing.assert_array_equal((weights_NE > 0).sum(axis=1), [0, 0, 2, 2, 2, 2])
    np.testing.assert_array_equal(pick(weights_NE, routing.experts_NK), routing.weights_NK)


def test_all_experts_in_their_own_order_need_no_comparison() -> None:
    """Masked tokens have weights of 0 both ways."""
    logits_NG, mask_N = jax.random.normal(KEY, (6, 8)), jnp.arange(6) > 1
    routing = route(logits_NG, k=8, select=shares_by_head(2), mask_N=mask_N)
    wanted_NG = dense_weights(routing, 8)
    assert wanted_NG[2:].all()
    np.testing.assert_array_equal(ordered_weights(routing, 8), wanted_NG)
    with pytest.raises(ValueError, match="2 choices are not all 8 experts"):
        ordered_weights(route(logits_NG, k=2), 8)
