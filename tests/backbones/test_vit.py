"""Vision transformers: forms, names, stochastic depth, MoE blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.backbones.vit import Block, ViT, ViTConfig
from moezoo.nn import module
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops import grouped
from moezoo.weights.names import VIT, to_ours, to_theirs
from tests.models.tiny import filled, image, quick_jit

CONFIG = ViTConfig(width=8, depth=3, heads=2, patch=4, mlp_ratio=2.0, drop_path=0.2)


def test_classifier_logits_are_float32_and_depend_on_the_image():
    parts = filled(lambda: ViT(CONFIG, (8, 16), classes=5, rngs=nnx.Rngs(0)))
    run = quick_jit(lambda p, x: module.merge(parts.definition, p, parts.stats)(x))
    logits, records = run(parts.params, image())
    assert logits.shape == (8, 5) and logits.dtype == jnp.float32 and not records
    assert not np.allclose(logits[0], logits[1])


def test_blocks_may_hold_experts():
    def make(block: int, rngs: nnx.Rngs) -> nnx.Module:
        if block != 1:
            return MLP(8, 16, rngs=rngs)
        return MoE(LinearRouter(8, 3, 1, rngs=rngs), MLPExperts(3, 8, 4, rngs=rngs), grouped.auto)

    parts = filled(lambda: ViT(CONFIG, (8, 16), 5, make_mlp=make, rngs=nnx.Rngs(0)))
    model = module.merge(*parts)
    records = jax.eval_shape(lambda x: model(x), image()).records
    assert list(records) == ["blocks/1/mlp"]
    assert records["blocks/1/mlp"].routing.experts_NK.shape == (8 * 9, 1)


def test_stochastic_depth_grows_with_depth():
    definition = module.abstract(lambda: ViT(CONFIG, (8, 16), 5, rngs=nnx.Rngs(0)))
    model = module.merge(*definition)
    np.testing.assert_allclose([block.drop_path for block in model.blocks], [0.0, 0.1, 0.2])


def test_a_dropped_block_passes_its_input_on():
    block = module.merge(*filled(lambda: Block(
        8, 2, MLP(8, 16, rngs=nnx.Rngs(0)), drop_path=0.5, rngs=nnx.Rngs(0))))  # fmt: skip
    x = jax.random.normal(jax.random.key(0), (64, 3, 8))
    y = quick_jit(lambda key: block(x, key=key).x_BTD)(jax.random.key(3))
    untouched = (np.asarray(y) == np.asarray(x)).all((1, 2))
    assert 5 <= untouched.sum() <= 30, "a quarter skips both halves"


def test_names_of_deit_and_timm_go_both_ways():
    parts = filled(lambda: ViT(CONFIG, (8, 16), classes=5, rngs=nnx.Rngs(0)))
    flat = module.flatten(parts.params)
    state, unknown = to_theirs(flat, VIT)
    assert not unknown and len(state) == len(flat)
    assert state["patch_embed.proj.weight"].shape == (8, 3, 4, 4)
    assert state["blocks.2.attn.qkv.weight"].shape == (24, 8)
    assert {"cls_token", "pos_embed", "norm.weight", "head.bias"} <= set(state)
    back, unknown = to_ours(state, VIT)
    assert not unknown and set(back) == set(flat)
    for path, array in back.items():
        np.testing.assert_array_equal(array, flat[path])
    np.testing.assert_array_equal(
        state["blocks.0.mlp.fc1.weight"], flat["blocks/0/mlp/fc1/kernel"].T
    )
