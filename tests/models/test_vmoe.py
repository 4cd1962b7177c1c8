"""V-MoE in its three routings: forms, placement, groups, noise, meshes, starting dense."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from moezoo.errors import UserError
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module, upcycled
from moezoo.nn.upcycle import upcycle
from moezoo.train import mesh as meshes
from moezoo.train.config import MeshConfig
from tests.models.tiny import BATCH, SIZE, call, filled, image, quick_jit

TASKS = {"scene": 3}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def config(**changes: Any) -> VMoEConfig:
    """Experts in block 1 of 2, a 2 x 4 grid."""
    sizes: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
    sizes |= {"experts": 4, "capacity_factor": 4.0, "group_images": 2}
    return VMoEConfig(**(sizes | changes))


def parts_of(config: VMoEConfig) -> module.ModuleParts:
    return filled(lambda: config.build(TASKS, SIZE, nnx.Rngs(0)))


@functools.cache
def model_of(**changes: Any) -> module.ModuleParts:
    return parts_of(config(**changes))


@pytest.mark.parametrize("routing", ["tokens_choose", "experts_choose", "soft"])
def test_every_routing_classifies_and_each_image_by_itself(routing):
    parts = model_of(routing=routing, pool="attention", noise_std=0.0)
    whole = call(parts)
    logits = whole.predictions["scene"]
    assert logits.shape == (BATCH, 3) and logits.dtype == jnp.float32 and not whole.auxiliary
    assert float(jnp.abs(logits - logits[0]).max()) > 1e-3
    np.testing.assert_allclose(call(parts, image()[:2]).predictions["scene"], logits[:2], **CLOSE)
    assert list(whole.records) == ([] if routing == "soft" else ["blocks/1/mlp"])
    for record in whole.records.values():
        chosen = np.asarray(record.routing.experts_NK) >= 0
        tokens = SIZE[0] // 4 * SIZE[1] // 4
        assert chosen.shape == (BATCH * tokens, 2 if routing == "tokens_choose" else 4)
        assert int(record.dropped) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"depth": 12}, (1, 3, 5, 7, 9, 11)),
        ({"depth": 12, "moe_last": 2}, (9, 11)),
        ({"depth": 32, "moe_last": 5}, (23, 25, 27, 29, 31)),
        ({"depth": 12, "moe_every": 1, "moe_last": 6}, (6, 7, 8, 9, 10, 11)),
        ({"depth": 12, "moe_every": 3}, (2, 5, 8, 11)),
        ({"depth": 4, "moe_blocks": (2, 1)}, (1, 2)),
        ({"depth": 4, "moe_last": 0}, ()),
    ],
)
def test_which_blocks_have_experts(changes, wanted):
    built = config(**changes)
    assert built.blocks_with_experts == wanted
    shapes = module.abstract(lambda: built.build(TASKS, SIZE, nnx.Rngs(0))).params
    found = {int(i) for i, block in shapes["blocks"].items() if "experts" in block["mlp"]}
    assert found == set(wanted)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"routing": "tokens"}, "tokens_choose"),
        ({"priority": "batch"}, "Unknown priority"),
        ({"pool": "cls"}, "Unknown pool"),
        ({"positions": "sincos"}, "sincos2d"),
        ({"qk_norm": "rms"}, "Unknown qk_norm"),
        ({"activation": "relu"}, "Unknown activation"),
        ({"capacity_rounding": "floor"}, "Unknown capacity_rounding"),
        ({"dispatch": "capasity"}, "capacity"),
        ({"top_k": 5}, "top_k is 5"),
        ({"moe_every": 3}, "moe_every is 3"),
        ({"moe_last": 2}, "moe_last is 2"),
        ({"moe_blocks": (2,)}, "moe_blocks"),
        ({"moe_blocks": (1, 1)}, "moe_blocks"),
        ({"group_images": 0}, "group_images is 0"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"noise_std": -1.0}, "noise_std"),
        ({"representation": 0}, "representation"),
        ({"reference_quirks": ("onestart",)}, "one_start"),
    ],
)
def test_disagreeing_settings_are_refused(changes, says):
    with pytest.raises(UserError, match=says):
        config(**changes)


def test_a_classifier_needs_a_task_with_classes():
    for tasks, says in (({}, "needs a task"), ({"scene": 0}, "0 classes")):
        with pytest.raises(UserError, match=says):
            config().build(tasks, SIZE, nnx.Rngs(0))


@pytest.mark.slow
def test_fresh_experts_differ_unless_asked_and_fresh_logits_are_the_bias():
    for quirks, equal in (((), False), (("one_start",), True)):
        built = config(reference_quirks=quirks, head_bias=-2.0)
        model = built.build(TASKS, SIZE, nnx.Rngs(0))
        kernel = np.asarray(model.blocks[1].mlp.experts.fc1.kernel.get_value())
        assert np.array_equal(kernel[0], kernel[1]) == equal and kernel.std() > 0
        assert not np.any(model.heads["scene"].kernel.get_value())
        np.testing.assert_array_equal(model.heads["scene"].bias.get_value(), -2.0)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["tokens_choose", "soft"])
def test_noise_acts_in_training_with_a_key_only(routing):
    parts = model_of(routing=routing, noise_std=4.0)
    quiet = call(parts, key=jax.random.key(1)).predictions["scene"]
    first, again, other = (
        call(parts, train=True, key=jax.random.key(k)).predictions["scene"] for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other) and not np.allclose(first, quiet)


def test_a_full_expert_drops_within_its_group_of_images_only():
    """With room for half of the choices the others are dropped, group by group."""
    parts = model_of(capacity_factor=0.5, noise_std=0.0)
    whole, half = call(parts), call(parts, image()[:4])
    (record,) = whole.records.values()
    assert 0 < int(record.dropped) < record.routing.experts_NK.size
    np.testing.assert_allclose(half.predictions["scene"], whole.predictions["scene"][:4], **CLOSE)
    model = module.merge(*parts)
    odd = jax.eval_shape(lambda x: model(x), image()[:3])
    assert odd.predictions["scene"].shape == (3, 3), "three images are three groups of one"


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    """Two devices for the batch, four for batch and experts; drops happen by groups of images."""
    parts = model_of(capacity_factor=0.5, group_images=1, noise_std=0.0, priority="probability")

    def loss(params, x):
        model = module.merge(parts.definition, params, parts.stats)
        output = model(x, train=True)
        (record,) = output.records.values()
        balance = {name: f(record.routing) for name, f in model.balance_losses.items()}
        total = jnp.mean(jnp.sin(output.predictions["scene"])) + sum(balance.values())
        return total, (output.predictions["scene"], balance, record.dropped)

    run = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (_, wanted), gradient = run(parts.params, image())
    assert int(wanted[2]) > 0
    mesh = meshes.make_mesh(MeshConfig(data=2, expert=4))
    with jax.set_mesh(mesh):
        placed = jax.device_put(image(), NamedSharding(mesh, meshes.BATCH))
        (_, found), there = run(parts.params, placed)
    for a, b in zip(
        jax.tree.leaves((found, there)), jax.tree.leaves((wanted, gradient)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_upcycling_starts_from_the_dense_function():
    dense = model_of(moe_last=0)
    sparse = model_of(selection="softmax_then_top_k_renormalised", dispatch="auto")
    params = upcycle(dense.params, sparse.params)
    wanted = call(dense).predictions["scene"]
    found = call(sparse._replace(params=params)).predictions["scene"]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    router = module.flatten(params)["blocks/1/mlp/router/kernel"]
    np.testing.assert_array_equal(router, sparse.params["blocks"]["1"]["mlp"]["router"]["kernel"])


def test_weights_of_the_published_code_are_rescaled_to_the_dense_function():
    dense, sparse = model_of(moe_last=0), model_of(dispatch="auto")
    params = jax.tree.map(jnp.asarray, upcycle(dense.params, sparse.params))
    model = module.merge(sparse.definition, params, sparse.stats)
    layer = model.blocks[1].mlp
    total = upcycled.weight_sum(layer)
    assert total == pytest.approx(0.5)  # two of four experts
    upcycled.rescale(layer, total)
    wanted = call(dense).predictions["scene"]
    found = call(sparse._replace(params=module.split(model).params)).predictions["scene"]
    np.testing.assert_allclose(found, wanted, **CLOSE)


def test_upcycling_needs_two_models_of_the_same_sizes():
    dense, sparse = model_of(moe_last=0).params, model_of().params
    with pytest.raises(UserError, match="blocks/0/mlp/fc1/bias of shape"):
        upcycle(parts_of(config(moe_last=0, mlp_ratio=1.0)).params, sparse)
    with pytest.raises(UserError, match="found no blocks/0"):
        upcycle({k: v for k, v in dense.items() if k != "blocks"} | {"blocks": {}}, sparse)
    with pytest.raises(UserError, match="no place for pre_logits/bias of the dense model and 1"):
        upcycle(parts_of(config(moe_last=0, representation=8)).params, sparse)
