"""Supports: which experts a task may choose from, before and after they are frozen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from moezoo.errors import UserError
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import exploration, module
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter, MultiGateRouter
from moezoo.nn.support import LearnedSupport, SupportConfig
from moezoo.ops import grouped
from moezoo.ops.routing import route

J, D, E, K = 3, 8, 6, 2


def layer(keep: int = 3, step: int = 2) -> MoE:
    rngs = nnx.Rngs(0)
    router = MultiGateRouter(J, D, E, K, init=jax.nn.initializers.normal(1.0), rngs=rngs)
    support = SupportConfig(keep, step).make(J, E)
    return MoE(router.within(support), MLPExperts(E, D, D, rngs=rngs), grouped.reference)


def tokens(seed: int, rows: int = J, each: int = 16) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=(rows * each, D))
    return jnp.asarray(values, jnp.float32)


def trained_step(moe: MoE, seed: int) -> None:
    """What a training step does to the state: two passes are shown, then it moves once."""
    model = nnx.Dict(mlp=moe)
    context, total = Context(jnp.arange(J)), None
    for part in range(2):
        record = moe(tokens(seed + 100 * part), context).record
        seen = exploration.choices(model, {"mlp": record})
        total = seen if total is None else jax.tree.map(jnp.add, total, seen)
    exploration.observe(model, total or {})


def test_experts_close_at_the_step_and_stay_closed() -> None:
    moe = layer()
    support = moe.router.support  # type: ignore[attr-defined]
    trained_step(moe, 0)
    assert np.asarray(support.open.get_value()).all()
    trained_step(moe, 1)
    open_JE, usage_JE = (np.asarray(v.get_value()) for v in (support.open, support.usage))
    for task in range(J):
        assert set(np.flatnonzero(open_JE[task])) == set(np.argsort(-usage_JE[task])[:3])
    trained_step(moe, 2)
    np.testing.assert_array_equal(support.open.get_value(), open_JE)
    routing = moe(tokens(9), Context(jnp.arange(J))).record.routing
    asked = np.asarray(routing.experts_NK).reshape(J, -1)
    for task in range(J):
        assert set(asked[task]) <= set(np.flatnonzero(open_JE[task]))
    # Nothing that training changes by gradients holds the state.
    assert not [name for name in module.flatten(module.split(moe).params) if "support" in name]


@given(seed=st.integers(0, 999), tasks=st.integers(1, 4), n=st.integers(1, 40), k=st.integers(1, 3))
def test_usage_is_the_weight_given_by_each_task(seed: int, tasks: int, n: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    mask_N = rng.uniform(size=n) < 0.8
    logits_NE = jnp.asarray(rng.normal(size=(n, E)), jnp.float32)
    routing = route(logits_NE, k=k, mask_N=jnp.asarray(mask_N))
    task_N = rng.integers(0, tasks, n)
    found = LearnedSupport(tasks, E, 2, 5).counted(routing, jnp.asarray(task_N))
    wanted = np.zeros((tasks, E))
    for i in np.flatnonzero(mask_N):
        for e, w in zip(routing.experts_NK[i], routing.weights_NK[i], strict=True):
            wanted[task_N[i], e] += w
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_one_tasks_router_decides_as_the_whole_one_bit_for_bit() -> None:
    moe = layer()
    for seed in range(2):
        trained_step(moe, seed)
    x_ND = tokens(3, rows=1, each=64)
    for task in range(J):
        alone = moe.router.of_task(task)  # type: ignore[attr-defined]
        assert alone.decision == "task_support" and len(alone.reach) == 3
        whole, own = (r(x_ND, Context(t)) for r, t in ((moe.router, task), (alone, 0)))
        np.testing.assert_array_equal(own.experts_NK, whole.experts_NK)
        np.testing.assert_array_equal(own.weights_NK, whole.weights_NK)
        assert set(np.unique(own.experts_NK)) <= set(alone.reach)


def test_tasks_that_share_tokens_share_the_set() -> None:
    router = LinearRouter(D, E, K, init=jax.nn.initializers.normal(1.0), rngs=nnx.Rngs(0))
    router.within(SupportConfig(2, 1).make(1, E))
    record = router(tokens(0), Context(2))
    router.observe(router.counted(record, jnp.full((48,), 2)))
    routing = router(tokens(1), Context(1))
    assert len(np.unique(routing.experts_NK)) == 2


def test_no_support_where_none_is_asked_for() -> None:
    assert SupportConfig().make(J, E) is None and SupportConfig(E, 5).make(J, E) is None
    router = LinearRouter(D, E, K, rngs=nnx.Rngs(0)).within(None)
    assert router.decision == "token" and router.reach is None
    assert router.counted(router(tokens(0), Context()), jnp.zeros(48, jnp.int32)) is None


SIZES = {"width": 16, "depth": 2, "heads": 2, "patch": 4}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda s: M3ViTConfig(**SIZES, experts=4, top_k=2, support=s(1, 5)), "between 2 and 4"),
        (lambda s: M3ViTConfig(**SIZES, experts=4, top_k=2, support=s(5, 5)), "between 2 and 4"),
        (lambda s: M3ViTConfig(**SIZES, experts=4, top_k=2, support=s(2, 0)), "support.step is 0"),
        (lambda s: M3ViTConfig(**SIZES, experts=4, top_k=2, support=s(0, 9)), "experts is 0"),
        (
            lambda s: VMoEConfig(**SIZES, experts=4, routing="experts_choose", support=s(2, 5)),
            "only tokens that choose",
        ),
    ],
)  # fmt: skip
def test_supports_that_make_no_sense_are_refused(make, says: str) -> None:
    with pytest.raises(UserError, match=says):
        make(SupportConfig)


def test_training_must_last_until_supports_are_frozen() -> None:
    config = M3ViTConfig(**SIZES, experts=4, top_k=2, support=SupportConfig(2, 100))
    config.check_steps(101)
    for other in (config, VMoEConfig(**SIZES, experts=4, support=SupportConfig(2, 100))):
        with pytest.raises(UserError, match="never be frozen"):
            other.check_steps(100)
    assert ModSquadConfig().support.of_heads == SupportConfig()
