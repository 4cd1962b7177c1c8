"""Heads, the training-only branch, the dense baseline, names of the published code."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.models.shared.multitask import shares
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module
from moezoo.nn.heads import UpConvHead, upsamplings
from moezoo.weights.m3vit_names import from_m3vit, to_reference
from tests.models.tiny import BATCH, SIZE, TASKS, call, config, filled, image, parts_of, quick_jit


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_heads_reach_image_resolution_from_any_power_of_two(patch):
    steps = upsamplings(patch)
    parts = filled(lambda: UpConvHead(6, 3, steps, channels=4, rngs=nnx.Rngs(0)))
    head = module.merge(*parts)
    logits, features = jax.eval_shape(lambda x: head(x, (2, 3)), jnp.ones((1, 7, 6)))
    assert logits.shape == (1, 2 * patch, 3 * patch, 3) and logits.dtype == jnp.float32
    assert [f.shape[1:3] for f in features] == [(2 * 2**l, 3 * 2**l) for l in range(1, steps)]  # noqa: E741


def test_heads_leave_the_class_token_out():
    head = module.merge(*filled(lambda: UpConvHead(6, 3, 1, channels=4, rngs=nnx.Rngs(0))))
    run = quick_jit(lambda x: head(x, (2, 3)).logits_BHWC)
    tokens = jax.random.normal(jax.random.key(0), (1, 7, 6))
    np.testing.assert_array_equal(run(tokens), run(tokens.at[:, 0].set(9.0)))


@pytest.mark.parametrize("patch", [0, 1, 3, 12])
def test_other_patches_are_refused(patch):
    with pytest.raises(UserError, match="power of two"):
        upsamplings(patch)


def test_shares_follow_the_published_split():
    a = jnp.asarray(0.25)
    wanted = {2: [0.25, 0.75], 3: [0.25, 0.375, 0.375], 4: [0.125, 0.125, 0.375, 0.375]}
    wanted |= {5: [0.125, 0.125, 0.25, 0.25, 0.25], 1: [0.25]}
    for tasks, values in wanted.items():
        np.testing.assert_allclose(shares(a, tasks), values)


@pytest.mark.slow
def test_the_training_branch_exists_in_training_only_and_learns_everywhere():
    parts = parts_of(config(patch=8, tam=(0, 1), depth=2), TASKS, (32, 16))
    x = image((32, 16), 2)

    def loss(params, tasks, train):
        output = module.merge(parts.definition, params, parts.stats)(x, tasks=tasks, train=train)
        return sum(
            jnp.sum(jnp.sin(a)) for level in output.auxiliary.values() for a in level
        ), output

    shapes = [jax.eval_shape(lambda p, t=t, r=r: loss(p, t, r)[1], parts.params)
              for t, r in ((None, False), (("depth",), True))]  # fmt: skip
    assert not shapes[0].auxiliary and not shapes[1].auxiliary
    grads, output = quick_jit(jax.grad(lambda p: loss(p, None, True), has_aux=True))(parts.params)
    for task, channels in TASKS.items():
        assert [a.shape for a in output.auxiliary[task]] == [(2, 32, 16, channels)] * 2
    for path, gradient in module.flatten(grads["tam"]).items():
        if not path.endswith("conv/bias"):  # batch norm takes these out
            assert gradient.any(), path
    for task in TASKS:
        assert grads["heads"][task]["convs"]["0"]["kernel"].any()
        assert not grads["heads"][task]["convs"]["3"]["kernel"].any()


@pytest.mark.slow
def test_training_moves_the_running_statistics_of_every_batch_norm():
    parts = parts_of(config(patch=8, tam=(0,), depth=2), TASKS, (16, 16))

    @jax.jit
    def updated(stats):
        model = module.merge(parts.definition, parts.params, stats)
        model(image((16, 16), 2), train=True)
        return module.updated_stats(model)

    new = module.flatten(updated(parts.stats))
    for path, old in module.flatten(parts.stats).items():
        assert not np.allclose(new[path], old), path


@pytest.mark.slow
def test_the_dense_baseline_shares_one_pass():
    dense = ViTDenseConfig(width=8, depth=2, heads=2, patch=4, head_channels=4, drop_path=0.5)
    parts = parts_of(dense)
    output = call(parts)
    assert not output.records and not output.auxiliary
    for task, channels in TASKS.items():
        assert output.predictions[task].shape == (BATCH, *SIZE, channels)
    alone = call(parts, tasks=("depth",))
    np.testing.assert_allclose(
        alone.predictions["depth"], output.predictions["depth"], rtol=1e-5, atol=1e-6
    )
    dropped = [call(parts, key=jax.random.key(k), train=True) for k in (1, 2)]
    assert not np.allclose(*(d.predictions["depth"] for d in dropped))


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["multi_gate", "task_conditioned", "single"])
def test_every_parameter_has_a_name_in_the_published_code(routing):
    tasks = {"semseg": 2, "parts": 2, "saliency": 1}
    parts = parts_of(config(routing=routing, patch=8, tam=(0,)), tasks, (16, 16))
    flat = module.flatten(parts.params) | module.flatten(parts.stats)
    state, unknown = to_reference(flat)
    assert not unknown
    assert "backbone.blocks.1.mlp.experts.htoh4.weight" in state
    assert "decoders.human_parts.syncbn_fc_0.running_mean" in state
    assert ("backbone.blocks.1.mlp.gate.2.w_gate" in state) == (routing == "multi_gate")
    assert state["backbone.patch_embed.proj.weight"].shape == (8, 3, 8, 8)
    counters = {"decoders.sal.syncbn_fc_0.num_batches_tracked": np.zeros(())}
    back, unknown = from_m3vit({f"module.{k}": v for k, v in (state | counters).items()})
    assert not unknown and set(back) == set(flat)
    for path, array in back.items():
        np.testing.assert_array_equal(array, flat[path])


def test_names_that_nobody_knows_are_listed():
    known = {
        "backbone.cls_token": np.zeros((1, 1, 4)),
        "backbone.blocks.0.norm3.weight": np.ones(4),
    }
    arrays, unknown = from_m3vit(known)
    assert set(arrays) == {"cls_token"} and unknown == ["backbone.blocks.0.norm3.weight"]
