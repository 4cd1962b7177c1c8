"""AdapterFusion against its equations, and what each of its two stages trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig, ExpertsConfig
from moezoo.domains.text.inference import asks_for_task
from moezoo.errors import UserError
from moezoo.models.adapter_fusion.model import AdapterFusionConfig
from moezoo.models.language.model import LanguageConfig
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.fused_adapters import FusedAdapters, FusionAttention
from moezoo.nn.upcycle import carry_over
from tests.models.test_mixda import parts_of, rows

DECODER = DecoderConfig(vocabulary=20, width=8, depth=2, heads=2, groups=1, hidden=6, length=16)
FUSION = AdapterFusionConfig(decoder=DECODER, tasks=3, bottleneck=4)
ADAPTERS = replace(FUSION, stage="adapters")


def layer(config: Any) -> FusedAdapters:
    return surgery.get(module.merge(*parts_of(config)), "layers/1/mlp")  # type: ignore[return-value]


def outputs(made: FusedAdapters, x: np.ndarray, context: Context) -> Any:
    """h, each z_j and what leaves, for one row of tokens."""
    h = np.asarray(made.base(jnp.asarray(x)[None], context.collecting())[0])
    z = np.asarray(made.adapters(jnp.asarray(h)[None])[0])
    return h, z, np.asarray(made(jnp.asarray(x)[None], context)[0])


def test_fusion_is_attention_of_the_mlp_over_its_adapters() -> None:
    made = layer(FUSION)
    mix: Any = made.mix
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    context = Context()
    h, z, y = outputs(made, x, context)
    q, k, v = (np.asarray(p.get_value()) for p in (mix.query.kernel, mix.key.kernel, mix.value))
    shift = np.asarray(mix.query.bias.get_value())
    (record,) = context.records.values()
    for n in range(5):
        scores = np.array([(h[n] @ q + shift) @ (z[n, j] @ k) for j in range(3)])
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        wanted = h[n] + sum(shares[j] * z[n, j] @ v for j in range(3))
        np.testing.assert_allclose(y[n], wanted, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(record.routing.weights_NK[n], shares, rtol=1e-4, atol=1e-5)


def test_the_first_stage_adds_a_task_s_own_adapter() -> None:
    made = layer(ADAPTERS)
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    for task in (0, 2, 7):
        h, z, y = outputs(made, x, Context(task))
        np.testing.assert_allclose(y, h if task == 7 else h + z[:, task], rtol=1e-4, atol=1e-5)


def test_only_the_first_stage_is_asked_with_a_task() -> None:
    assert asks_for_task(module.merge(*parts_of(ADAPTERS)))
    assert not asks_for_task(module.merge(*parts_of(FUSION)))


def features(parts: module.ModuleParts, params: Any, task: int) -> jax.Array:
    model = module.merge(parts.definition, params, parts.stats)
    return model.read(rows(task), train=False).predictions["lm"].x_BTD


def test_a_task_teaches_its_own_adapter_and_fusion_is_told_no_task() -> None:
    parts = parts_of(ADAPTERS)
    assert all("/adapters/" in path for path in module.flatten(parts.params))
    grads = jax.grad(lambda p: jnp.sum(features(parts, p, 2) ** 2))(parts.params)
    for path, grad in module.flatten(grads).items():
        assert [bool(np.abs(grad[j]).max()) for j in range(3)] == [False, False, True], path
    parts = parts_of(FUSION)
    assert all("/mix/" in path for path in module.flatten(parts.params))
    first, second = (features(parts, parts.params, task) for task in (0, 2))
    np.testing.assert_array_equal(first, second)
    grads = jax.grad(lambda p: jnp.sum(features(parts, p, 0) ** 2))(parts.params)
    assert all(np.abs(grad).max() > 0 for grad in module.flatten(grads).values())


def test_values_begin_as_the_identity_and_a_loss_keeps_them_there() -> None:
    fresh = FUSION.build({"lm": 20}, (1, 16), nnx.Rngs(0))
    assert float(fresh.read(rows(0), key=jax.random.key(0), train=True).losses["identity"]) == 0
    model = module.merge(*parts_of(FUSION))
    values = [
        np.asarray(m.value.get_value()) for m in surgery.find(model, FusionAttention).values()
    ]
    assert len(values) == 2
    wanted = 0.01 * sum(((np.eye(8) - v) ** 2).sum() for v in values)
    losses = model.read(rows(0), key=jax.random.key(0), train=True).losses
    np.testing.assert_allclose(losses["identity"], wanted, rtol=1e-5)
    assert not model.read(rows(0), train=False).losses


def test_stages_take_over_what_was_before() -> None:
    base, first, second = (parts_of(c) for c in (LanguageConfig(decoder=DECODER), ADAPTERS, FUSION))
    begun = carry_over(module.flatten(base.params), first.stats)
    assert not begun.unused and not begun.fresh
    taken = carry_over(module.flatten(first.params) | module.flatten(first.stats), second.stats)
    assert not taken.unused and not taken.fresh


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": 1}, "nothing to attend to"),
        ({"decoder": replace(DECODER, experts=ExpertsConfig(count=2, hidden=4))}, "has experts"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(FUSION, **changes)
