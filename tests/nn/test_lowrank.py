"""The family of low-rank updates: equivalences, routers, dropout, errors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.condition_routers import TaskTableRouter
from moezoo.nn.context import Context
from moezoo.nn.lowrank import (
    GATES,
    LowRank,
    dropped,
    lora,
    mixture,
    rank_experts,
    rs_lora,
    unweighted_router,
)
from moezoo.ops.balance import choice_counts
from tests.models.tiny import filled, quick_jit

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
D, OUT, R, N = 6, 5, 8, 9
X = jnp.asarray(np.random.default_rng(0).normal(size=(N, D)), jnp.float32)
KEY = jax.random.key(0)


def run(parts: module.ModuleParts, *args, **options):
    """What a pass adds, and its record."""

    def forward(params, stats, *args):
        return module.merge(parts.definition, params, stats)(*args, **options)

    return quick_jit(forward)(parts.params, parts.stats, *args)


def smora(**options) -> module.ModuleParts:
    return filled(lambda: rank_experts(D, OUT, R, alpha=16.0, rngs=nnx.Rngs(0), **options))


def test_a_fresh_update_adds_nothing_and_trains_up_first() -> None:
    update = rank_experts(D, OUT, R, active=2, alpha=16.0, rngs=nnx.Rngs(0))
    parts = module.split(update)

    def loss(params):
        y, _ = module.merge(parts.definition, params, parts.stats)(X)
        return jnp.sum(y + jnp.square(y))

    assert not run(parts, X)[0].any()
    grads = quick_jit(jax.grad(loss))(parts.params)
    assert grads["up"].any() and not grads["down"].any()
    bound = 1 / np.sqrt(D)
    assert 0.5 * bound < jnp.abs(update.down.get_value()).max() <= bound


def test_one_family() -> None:
    """Equal scores of all ranks are plain LoRA; blocks of all ranks are one expert."""
    alpha, bank = 16.0, smora(active=R)
    bank.params["router"]["kernel"] *= 0
    bank.stats["router"]["bias"] *= 0
    plain = module.abstract(lambda: lora(D, OUT, R, alpha=alpha, rngs=nnx.Rngs(0)))
    own = {name: bank.params[name] for name in ("down", "up")}
    y, _ = run(plain._replace(params=own), X)
    np.testing.assert_allclose(run(bank, X)[0], y, **CLOSE)
    one_block = smora(active=R, block=R, gate="unweighted")
    one_block = one_block._replace(params=own | {"router": one_block.params["router"]})
    np.testing.assert_allclose(run(one_block, X)[0], y, **CLOSE)


@pytest.mark.parametrize("gate", list(GATES))
def test_gates(gate: str) -> None:
    parts = smora(active=3, gate=gate)
    record = run(parts, X)[1]
    logits, bias = X @ parts.params["router"]["kernel"], parts.stats["router"]["bias"]
    score = logits if gate == "softmax" else jax.nn.sigmoid(logits)
    order = np.argsort(-(score + bias), axis=1)[:, :3]
    np.testing.assert_array_equal(record.routing.experts_NK, order)
    chosen = np.take_along_axis(np.asarray(score), order, axis=1)
    biases = np.asarray(bias)[order]
    wanted = {
        "published": (chosen + biases) / (chosen + biases).sum(1, keepdims=True),
        "unbiased": chosen / chosen.sum(1, keepdims=True),
        "score": chosen,
        "softmax": np.exp(chosen) / np.exp(chosen).sum(1, keepdims=True),
    }[gate]
    np.testing.assert_allclose(record.routing.weights_NK, wanted, rtol=1e-4, atol=1e-5)


def router_gradient(parts: module.ModuleParts) -> float:
    """The largest entry of the router's gradient."""

    def loss(params):
        return jnp.sum(module.merge(parts.definition, params, parts.stats)(X)[0])

    grads = quick_jit(jax.grad(loss))(parts.params)
    return float(jnp.abs(grads["router"]["kernel"]).max())


@pytest.mark.parametrize("block", [1, 4])
def test_a_single_block_trains_its_router(block: int) -> None:
    """By default, because the published gate's weight would be 1 whatever is scored."""
    assert router_gradient(smora(active=block, block=block)) > 1e-3
    for gate in set(GATES) - {"score"}:
        with pytest.raises(UserError, match=f"gate is {gate}.*never learn; take gate score"):
            smora(active=block, block=block, gate=gate)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_mixture_trains_its_router(k: int) -> None:
    def build() -> LowRank:
        return mixture(D, OUT, R, experts=4, k=k, alpha=8.0, rngs=nnx.Rngs(0))

    assert router_gradient(filled(build)) > 1e-3


def test_published_quirks_of_a_single_choice_are_reached_by_name() -> None:
    def build() -> LowRank:
        made = {"experts": 4, "k": 1, "alpha": 8.0, "make_router": unweighted_router}
        return mixture(D, OUT, R, **made, rngs=nnx.Rngs(0))

    for parts in (filled(build), smora(active=1, gate="unweighted")):
        assert router_gradient(parts) == 0.0
        np.testing.assert_array_equal(run(parts, X)[1].routing.weights_NK, 1.0)


def test_a_bias_far_below_zero_gives_finite_weights() -> None:
    parts = smora(active=2)
    parts.stats["router"]["bias"] = jnp.full((R,), -0.9)
    y, record = run(parts, X)
    assert jnp.isfinite(y).all() and jnp.isfinite(record.routing.weights_NK).all()


def test_padding_is_counted_nowhere() -> None:
    parts = smora(active=2)
    mask_N = jnp.arange(N) % 3 > 0
    spoiled = jnp.where(mask_N[:, None], X, jnp.nan)

    def forward(params, stats, x):
        update = module.merge(parts.definition, params, stats)
        y, record = update(x, mask_N=mask_N)
        return y, choice_counts(record.routing)

    y, counts = quick_jit(forward)(parts.params, parts.stats, spoiled)
    assert counts.sum() == 2 * mask_N.sum()
    whole, _ = run(parts, X)
    np.testing.assert_allclose(y[mask_N], whole[mask_N], **CLOSE)


def test_dropout_is_seen_by_router_and_ranks() -> None:
    x = jnp.ones((200, 50))
    half = dropped(x, 0.5, KEY)
    assert set(np.unique(half)) == {0.0, 2.0} and 0.45 < (half > 0).mean() < 0.55
    np.testing.assert_array_equal(dropped(x, 0.5, None), x)
    np.testing.assert_array_equal(dropped(x, 0.0, KEY), x)
    parts = smora(active=2, dropout=0.5)
    y, record = run(parts, X, Context(0), KEY)
    seen = dropped(X, 0.5, KEY)
    alone = run(smora(active=2), seen)
    np.testing.assert_allclose(y, alone[0], **CLOSE)
    np.testing.assert_array_equal(record.routing.experts_NK, alone[1].routing.experts_NK)


def test_a_mixture_by_task_is_a_matrix_per_task() -> None:
    def table(inputs, experts, k, rngs):
        return TaskTableRouter(3, experts, k, rngs=rngs)

    def build() -> LowRank:
        return mixture(D, OUT, R, experts=4, k=2, alpha=8.0, make_router=table, rngs=nnx.Rngs(0))

    parts = filled(build)
    update = module.merge(*parts)
    for task in range(3):
        y, _ = run(parts, X, Context(jnp.asarray([task])))
        delta = update.delta(update.constant_gates(task))
        np.testing.assert_allclose(X @ delta, y, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="needs a task"):
        update.constant_gates()


def test_scales() -> None:
    assert lora(D, OUT, 4, alpha=8.0, rngs=nnx.Rngs(0)).scale == 2.0
    assert rs_lora(D, OUT, 4, alpha=8.0, rngs=nnx.Rngs(0)).scale == 4.0
    assert mixture(D, OUT, 8, experts=4, k=1, alpha=8.0, rngs=nnx.Rngs(0)).scale == 4.0
    made = rank_experts(D, OUT, 8, active=4, block=2, alpha=8.0, rngs=nnx.Rngs(0))
    assert made.scale == 4.0 and made.experts == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora(D, OUT, 0, alpha=1.0, rngs=nnx.Rngs(0)), "rank is 0"),
        (lambda: mixture(D, OUT, 8, experts=3, k=1, alpha=1.0, rngs=nnx.Rngs(0)), "8 ranks"),
        (lambda: mixture(D, OUT, 8, experts=4, k=5, alpha=1.0, rngs=nnx.Rngs(0)), "5 of 4"),
        (lambda: rank_experts(D, OUT, 8, active=9, alpha=1.0, rngs=nnx.Rngs(0)), "9 active"),
        (lambda: rank_experts(D, OUT, 0, active=1, alpha=1.0, rngs=nnx.Rngs(0)), "rank is 0"),
        (lambda: rank_experts(D, OUT, 8, active=3, block=2, alpha=1.0, rngs=nnx.Rngs(0)), "Blocks"),
        (lambda: rank_experts(D, OUT, 8, active=2, gate="x", alpha=1.0, rngs=nnx.Rngs(0)), "gate"),
    ],
)
def test_impossible_sizes(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
