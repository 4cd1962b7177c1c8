"""Routers that sample, that carry a bias, that look at other tokens or take a given decision."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.batch_routers import EnsembleRouter, ExpertsChooseRouter, GivenRouter
from moezoo.nn.context import NO_TASK, Context
from moezoo.nn.experts import GatedMLPExperts, MLPExperts
from moezoo.nn.exploration import BalancedRouter, SampledRouter, choices, observe
from moezoo.nn.layers import trunc_normal
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter, MultiGateRouter
from moezoo.ops import grouped
from moezoo.ops.balance import choice_counts
from moezoo.ops.capacity import by_lot, capacity
from moezoo.ops.routing import constant_noise, experts_choose

B, T, D, E, K, F = 4, 5, 8, 6, 2, 7
X = jax.random.normal(jax.random.key(0), (B * T, D))
KEY = jax.random.key(1)
STRONG = partial(trunc_normal, std=1.0)


def moe(router, backend=grouped.reference) -> MoE:
    return MoE(router, MLPExperts(E, D, F, init=STRONG, rngs=nnx.Rngs(1)), backend)


@pytest.mark.slow
def test_a_sampled_router_samples_with_a_key_only() -> None:
    router = SampledRouter(D, E, K, best=1, init=STRONG, rngs=nnx.Rngs(0))
    plain = LinearRouter(D, E, K, init=STRONG, rngs=nnx.Rngs(0))(X, NO_TASK)
    quiet, loud = router(X, NO_TASK), router(X, NO_TASK, KEY)
    np.testing.assert_array_equal(quiet.experts_NK, plain.experts_NK)
    assert quiet.lot_NK is None and loud.lot_NK is not None
    np.testing.assert_array_equal(loud.experts_NK[:, 0], plain.experts_NK[:, 0])
    assert bool((loud.experts_NK[:, 1] != plain.experts_NK[:, 1]).any())
    np.testing.assert_array_equal(loud.probs_NE, plain.probs_NE)
    layer = moe(router, capacity(0.5, priority=by_lot))
    first, second = (layer(X, key=jax.random.key(i)).record for i in (1, 2))
    assert int(first.dropped) > 0 and int(second.dropped) > 0


def test_the_bias_is_state_that_balances_and_that_no_gradient_reaches() -> None:
    router = BalancedRouter(D, E, K, rate=0.05, init=STRONG, rngs=nnx.Rngs(0))
    parts = module.split(moe(router))
    assert module.flatten(parts.stats).keys() == {"router/bias"}
    assert "bias" not in parts.params["router"]

    @jax.jit
    def step(stats):
        layer = module.merge(parts.definition, parts.params, stats)
        record = layer(X).record
        layer.router.observe(choice_counts(record.routing))
        return module.updated_stats(layer), record.routing.experts_NK

    stats, first = step(parts.stats)
    for _ in range(40):
        stats, last = step(stats)
    most_first, most_last = (np.bincount(np.ravel(e), minlength=E).max() for e in (first, last))
    assert most_last < most_first
    bias_E = stats["router"]["bias"]
    np.testing.assert_allclose(bias_E / 0.05, np.round(bias_E / 0.05), atol=1e-3)


def test_observing_a_whole_model_by_path() -> None:
    model = nnx.Dict(
        first=moe(BalancedRouter(D, E, K, init=STRONG, rngs=nnx.Rngs(0))),
        second=moe(LinearRouter(D, E, K, init=STRONG, rngs=nnx.Rngs(0))),
    )
    records = {name: model[name](X).record for name in ("first", "second")}
    observe(model, choices(model, records))
    stats = module.updated_stats(model)
    assert module.flatten(stats).keys() == {"first/router/bias"}
    assert stats["first"]["router"]["bias"].any()


@pytest.mark.slow
def test_experts_choose_tokens_within_groups() -> None:
    router = ExpertsChooseRouter(D, E, 2, group=T, init=STRONG, rngs=nnx.Rngs(0))
    assert router.decision == "row" and router.k == E
    alone = ExpertsChooseRouter(D, E, 2, rngs=nnx.Rngs(0))
    assert alone.decision == "batch", "without groups the whole batch decides"
    mask_N = jnp.arange(B * T) % 7 > 0
    spoiled = jnp.where(mask_N[:, None], X, jnp.nan)
    routing = router(spoiled, NO_TASK, mask_N=mask_N)
    for row in range(B):
        tokens = slice(row * T, (row + 1) * T)
        alone = experts_choose(
            jnp.where(mask_N[:, None], X, 0)[tokens] @ router.kernel.get_value(),
            slots=2,
            mask_N=mask_N[tokens],
        )
        np.testing.assert_array_equal(routing.experts_NK[tokens], alone.routing.experts_NK)
    whole = ExpertsChooseRouter(D, E, 3, noise=constant_noise(9.0), init=STRONG, rngs=nnx.Rngs(0))
    quiet, loud = whole(X, NO_TASK), whole(X, NO_TASK, KEY)
    np.testing.assert_array_equal((quiet.experts_NK >= 0).sum(axis=0), [3] * E)
    assert bool((quiet.experts_NK != loud.experts_NK).any())
    with pytest.raises(UserError, match="groups of 7"):
        ExpertsChooseRouter(D, E, 2, group=7, rngs=nnx.Rngs(0))(X, NO_TASK)
    with pytest.raises(UserError, match="0 slots"):
        ExpertsChooseRouter(D, E, 0, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_experts_that_choose_work_with_a_dropless_backend() -> None:
    router = ExpertsChooseRouter(D, E, 2, group=T, init=STRONG, rngs=nnx.Rngs(0))
    truth, fast = (moe(router, b)(X).y_ND for b in (grouped.reference, grouped.blocks))
    np.testing.assert_allclose(fast, truth, atol=1e-4)


@pytest.mark.slow
def test_an_ensembles_tokens_stay_with_their_member() -> None:
    router = EnsembleRouter(D, E, 3, members=2, init=STRONG, rngs=nnx.Rngs(0))
    experts_NK = np.sort(router(X, NO_TASK).experts_NK, axis=1)
    np.testing.assert_array_equal(experts_NK[::2], [[0, 1, 2]] * (B * T // 2))
    np.testing.assert_array_equal(experts_NK[1::2], [[3, 4, 5]] * (B * T // 2))
    with pytest.raises(UserError, match="choose 4 each"):
        EnsembleRouter(D, E, 4, members=2, rngs=nnx.Rngs(0))


def test_a_given_decision_is_shared() -> None:
    source = MultiGateRouter(3, D, E, K, init=STRONG, rngs=nnx.Rngs(0))
    first, second = moe(source), moe(GivenRouter(source))
    assert second.router.decision == "token" and second.router.depends_on_task
    condition = Context(2)
    y_ND, record = first(X, condition)
    shared = second(2 * X, replace(condition, routing=record.routing))
    np.testing.assert_array_equal(shared.record.routing.experts_NK, record.routing.experts_NK)
    np.testing.assert_allclose(shared.y_ND, first.mix(2 * X, record.routing, condition).y_ND)
    mask_N = jnp.arange(B * T) > 3
    masked = second(X, replace(condition, routing=record.routing), mask_N=mask_N)
    assert not masked.y_ND[:4].any()
    np.testing.assert_allclose(masked.y_ND[4:], y_ND[4:], atol=1e-5)
    with pytest.raises(ValueError, match="context.routing"):
        second(X, condition)
    params = module.split(second).params
    assert "router" not in params, "a shared decision has no parameters of its own"


@pytest.mark.slow
def test_gated_experts() -> None:
    experts = GatedMLPExperts(E, D, F, init=STRONG, rngs=nnx.Rngs(0))
    router = LinearRouter(D, E, K, init=STRONG, rngs=nnx.Rngs(1))
    y_ND, record = MoE(router, experts, grouped.blocks)(X)
    gate, up, down = (experts.stacked()[n]["kernel"] for n in ("gate", "up", "down"))
    expected = np.zeros((B * T, D))
    for n in range(B * T):
        for e, weight in zip(*(a[n] for a in record.routing[:2]), strict=True):
            z = np.asarray(X[n] @ gate[e], np.float64)
            hidden = z / (1 + np.exp(-z)) * np.asarray(X[n] @ up[e])
            expected[n] += float(weight) * hidden @ np.asarray(down[e])
    np.testing.assert_allclose(y_ND, expected, rtol=1e-3, atol=1e-3)
    fewer = experts.take([4, 1])
    assert (fewer.count, fewer.hidden) == (2, F)
    np.testing.assert_array_equal(fewer.stacked()["up"]["kernel"], up[jnp.asarray([4, 1])])
    with pytest.raises(UserError, match="at least 1"):
        GatedMLPExperts(0, D, F, rngs=nnx.Rngs(0))
