"""Injecting updates by path, freezing what is below, folding them away."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.nn import exploration, module
from moezoo.nn.injection import Adapted, Frozen, fold, freeze, inject
from moezoo.nn.lowrank import LowRank, lora, rank_experts
from moezoo.ops.balance import choice_counts
from tests.models.tiny import filled, quick_jit

TINY = DecoderConfig(vocabulary=11, width=8, depth=2, heads=2, groups=1, hidden=6)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 5)), jnp.int32)


def make(inputs: int, outputs: int) -> LowRank:
    return rank_experts(inputs, outputs, 4, active=2, alpha=4.0, rate=0.5, rngs=nnx.Rngs(1))


def plain(inputs: int, outputs: int) -> LowRank:
    return lora(inputs, outputs, 4, alpha=4.0, rngs=nnx.Rngs(1))


def adapted(make_update, dtype=None) -> module.ModuleParts:
    def build():
        model = TINY.build(nnx.Rngs(0))
        inject(model, ["layers/*"], make_update)
        freeze(model, dtype)
        return model

    return filled(build)


def logits(parts: module.ModuleParts, **options):
    def forward(params, stats, tokens):
        return module.merge(parts.definition, params, stats)(tokens, **options)

    return quick_jit(forward)(parts.params, parts.stats, TOKENS)


def test_every_linear_layer_but_the_head() -> None:
    parts = adapted(make)
    trained = set(module.flatten(parts.params))
    layers = {
        f"layers/{i}/{part}/update"
        for i in range(2)
        for part in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
    }
    assert trained == {f"{p}/{n}" for p in layers for n in ("down", "up", "router/kernel")}
    rest = set(module.flatten(parts.stats))
    assert {"embed/table", "lm_head/kernel", "layers/0/attn/q/base/kernel"} <= rest
    assert {f"{p}/router/bias" for p in layers} <= rest
    output = logits(parts)
    assert set(output.records) == {p.removesuffix("/update") for p in layers}
    assert all(record.routing.experts_NK.shape == (10, 2) for record in output.records.values())


@pytest.mark.slow
def test_only_updates_are_trained_and_biases_move_by_the_rule() -> None:
    parts = adapted(make)

    def loss(params, stats):
        model = module.merge(parts.definition, params, stats)
        output = model(TOKENS, mask_BT=TOKENS > 0, train=True)
        choices = exploration.choices(model, output.records)
        exploration.observe(model, choices)
        return jnp.mean(jnp.square(output.logits_BTV)), (module.updated_stats(model), choices)

    (_, (stats, choices)), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(
        parts.params, parts.stats
    )
    assert all(leaf.any() for leaf in module.flatten(grads).values())
    for path, before in module.flatten(parts.stats).items():
        after = module.flatten(stats)[path]
        if not path.endswith("router/bias"):
            np.testing.assert_array_equal(after, before)
            continue
        counts = choices[path.removesuffix("/update/router/bias")]
        assert counts.sum() == 2 * (TOKENS > 0).sum(), "padding is counted nowhere"
        moved = 0.5 * np.sign(np.mean(counts) - counts)
        np.testing.assert_allclose(after, before + moved, rtol=1e-6, atol=1e-6)


def test_a_frozen_base_of_another_type() -> None:
    def build():
        model = TINY.build(nnx.Rngs(0))
        inject(model, ["*/attn/[qv]"], make)
        freeze(model, jnp.bfloat16)
        return model

    parts = module.abstract(build)
    stats = module.flatten(parts.stats)
    own = [p for p in stats if not p.endswith("router/bias")]
    assert all(stats[p].dtype == jnp.bfloat16 for p in own) and own
    assert all(leaf.dtype == jnp.float32 for leaf in module.flatten(parts.params).values())
    assert {p.split("/")[3] for p in module.flatten(parts.params)} == {"q", "v"}


@pytest.mark.slow
def test_rematerialised_layers_report_and_train_alike() -> None:
    found = []
    for remat in (False, True):
        config = DecoderConfig(**{**TINY.__dict__, "remat": remat})

        def build(config=config):
            model = config.build(nnx.Rngs(0))
            inject(model, ["*/mlp/up"], make)
            freeze(model)
            return model

        parts = filled(build)

        def loss(params, parts=parts):
            output = module.merge(parts.definition, params, parts.stats)(TOKENS, train=True)
            counts = {p: choice_counts(r.routing) for p, r in output.records.items()}
            return jnp.mean(jnp.square(output.logits_BTV)), counts

        found.append(quick_jit(jax.value_and_grad(loss, has_aux=True))(parts.params))
    ((_, counts), grads), ((_, again), same) = found
    jax.tree.map(np.testing.assert_array_equal, counts, again)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, same)


def test_folding() -> None:
    parts = adapted(plain)
    model = module.merge(*parts)
    fold(model)
    folded = module.split(model)
    assert not module.flatten(folded.params), "a frozen model has nothing left to train"
    assert set(module.flatten(folded.stats)) == set(
        module.flatten(module.abstract(lambda: TINY.build(nnx.Rngs(0))).params)
    )
    wanted, found = logits(parts).logits_BTV, logits(folded).logits_BTV
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="depend on tokens"):
        fold(module.merge(*adapted(make)))


def test_paths() -> None:
    model = TINY.build(nnx.Rngs(0))
    assert inject(model, ["*/attn/q"], plain) == ("layers/0/attn/q", "layers/1/attn/q")
    assert isinstance(model.layers[0].attn.q, Adapted)
    with pytest.raises(UserError, match="fits no linear layer; some of the model's are layers/0"):
        inject(model, ["*/attention/q"], plain)
    with pytest.raises(UserError, match="fits no linear layer"):
        inject(model, ["*/attn/q"], plain)  # it has an update already
    freeze(model)
    assert isinstance(model.embed.table, Frozen)
    assert isinstance(model.layers[0].attn.q.update.down, nnx.Param)
