"""Mod-Squad: layouts, batching of tasks, gradients, sharding, sizes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moezoo.errors import UserError
from moezoo.models.mod_squad.model import LAYOUTS, ModSquadConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module
from moezoo.nn.moa import MoA
from moezoo.nn.moe import MoE
from tests.models.tiny import BATCH, SIZE, TASKS, call, image, parts_of, quick_jit

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
ATTENTION, MLP = "blocks/0/attn", "blocks/1/mlp"


def config(**changes: Any) -> ModSquadConfig:
    """Attention experts in block 0, MLP experts in block 1, a 2 x 4 grid."""
    sizes: dict[str, Any] = {"width": 8, "depth": 2, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
    sizes |= {"experts": 4, "top_k": 2, "head_experts": 4, "head_channels": 4}
    return ModSquadConfig(**(sizes | changes))


@functools.cache
def model_of(**changes: Any) -> module.ModuleParts:
    return parts_of(config(**changes))


@functools.cache
def all_tasks():
    return call(model_of())


@pytest.mark.slow
def test_predictions_and_records() -> None:
    output = all_tasks()
    for task, channels in TASKS.items():
        logits = output.predictions[task]
        assert logits.shape == (BATCH, *SIZE, channels) and logits.dtype == jnp.float32
        assert jnp.isfinite(logits).all()
    assert list(output.records) == [ATTENTION, MLP]
    tokens = 1 + (SIZE[0] // 4) * (SIZE[1] // 4)
    wanted = np.repeat(np.tile(range(len(TASKS)), BATCH), tokens)
    for record in output.records.values():
        np.testing.assert_array_equal(record.task_N, wanted)
        assert record.routing.experts_NK.shape == (len(wanted), 2)
        assert float(record.routing.weights_NK.sum(1).max()) < 1.0  # not renormalised


@pytest.mark.slow
def test_one_task_alone_equals_its_part_of_all_tasks() -> None:
    together = all_tasks()
    for index, task in enumerate(TASKS):
        alone = call(model_of(), tasks=(task,))
        np.testing.assert_allclose(alone.predictions[task], together.predictions[task], **CLOSE)
        for path, record in alone.records.items():
            mine = np.asarray(together.records[path].task_N) == index
            chosen = np.asarray(together.records[path].routing.experts_NK)[mine]
            np.testing.assert_array_equal(record.routing.experts_NK, chosen)


def test_tasks_differ_from_the_first_block_on() -> None:
    routing = all_tasks().records[ATTENTION].routing
    logits_BJTE = np.asarray(routing.logits_NE).reshape(BATCH, len(TASKS), -1, 4)
    assert not np.allclose(logits_BJTE[:, 0], logits_BJTE[:, 1])


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts(layout: str) -> None:
    parts = module.abstract(lambda: config(layout=layout).build(TASKS, SIZE, nnx.Rngs(0)))
    model = module.merge(*parts)
    for i, block in enumerate(model.blocks):
        wanted = LAYOUTS[layout](i)
        assert (isinstance(block.attn, MoA), isinstance(block.mlp, MoE)) == wanted
        if not wanted[0]:
            assert block.attn.proj.kernel.shape == (16, 8)


@pytest.mark.slow
def test_every_parameter_has_a_gradient() -> None:
    parts = parts_of(config(layout="both", noise="learned"))

    def loss(params):
        model = module.merge(parts.definition, params, parts.stats)
        output = model(image(), train=True, key=jax.random.key(0))
        return sum(jnp.sum(jnp.sin(p)) for p in output.predictions.values())

    for path, leaf in module.flatten(quick_jit(jax.grad(loss))(parts.params)).items():
        assert jnp.isfinite(leaf).all(), path
        if not path.startswith("heads"):
            flat = leaf if path.endswith("task_bias/bias") else leaf.reshape(1, -1)
            assert bool(jnp.any(flat != 0, axis=-1).all()), path


@pytest.mark.slow
def test_noise_acts_in_training_with_a_key_only() -> None:
    parts = parts_of(config(noise="learned"))
    quiet = call(parts, tasks=("depth",)).predictions["depth"]
    loud = call(parts, tasks=("depth",), train=True, key=jax.random.key(1))
    again = call(parts, tasks=("depth",), key=jax.random.key(1)).predictions["depth"]
    np.testing.assert_array_equal(quiet, again)
    routing = loud.records[ATTENTION].routing
    assert not np.allclose(routing.noisy_NE, routing.logits_NE)


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["auto", "all_to_all"])
def test_eight_devices_give_what_one_gives(dispatch: str) -> None:
    parts = parts_of(config(dispatch=dispatch))
    plain = model_of()

    def run(definition, params, x):
        output = module.merge(definition, params, plain.stats)(x)
        return output.predictions, {path: r.dropped for path, r in output.records.items()}

    wanted, _ = quick_jit(functools.partial(run, plain.definition))(plain.params, image())
    axes = ("data", "fsdp", "expert", "tensor")
    mesh = jax.make_mesh((2, 1, 4, 1), axes, axis_types=(AxisType.Auto,) * 4)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))

    def place(path, leaf):
        inside = any(getattr(p, "key", "") == "experts" for p in path)
        spec = PartitionSpec("expert") if inside else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        params = jax.tree_util.tree_map_with_path(place, parts.params)
        here = quick_jit(functools.partial(run, parts.definition))
        found, dropped = here(params, jax.device_put(image(), rows))
    if dispatch == "auto":
        assert not any(map(int, dropped.values()))
        jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), found, wanted)
    else:  # what travels in buffers of fixed size may be dropped, never more than there is
        assert all(0 <= int(lost) < BATCH * 2 * 9 * 2 for lost in dropped.values())


def test_heads_over_the_expert_axis_must_split_evenly() -> None:
    mesh = jax.make_mesh((1, 1, 4, 1), ("data", "fsdp", "expert", "tensor"),
                         axis_types=(AxisType.Auto,) * 4, devices=jax.devices()[:4])  # fmt: skip
    parts = parts_of(config(head_experts=6))
    with jax.set_mesh(mesh), pytest.raises(UserError, match="6 experts"):
        jax.eval_shape(lambda p: module.merge(parts.definition, p, parts.stats)(image()),
                       parts.params)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_k": 5}, "top_k is 5"),
        ({"heads": 1, "head_experts": 0}, "head_experts is 0; it must be at least 1"),
        ({"expert_ratio": 0.0}, "expert_ratio"),
        ({"head_ratio": 0.1}, "head_ratio"),
        ({"layout": "twise"}, "twice"),
        ({"noise": "learnt"}, "learned"),
        ({"router_std": -1.0}, "router_std"),
        ({"dispatch": "block"}, "blocks"),
        ({"reference_quirks": ("smoothed",)}, "smoothed_probabilities"),
    ],
)
def test_disagreeing_sizes_are_refused_in_one_sentence(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config(**changes)


@pytest.mark.slow
def test_reference_quirks() -> None:
    quirks = ("smoothed_probabilities", "task_vector_init")
    made = [config(reference_quirks=q).build(TASKS, SIZE, nnx.Rngs(0)) for q in ((), quirks)]
    sound, quirky = (model.task_bias.bias.get_value() for model in made)
    assert float(jnp.abs(sound).max()) <= 0.04 < 0.5 < float(jnp.std(quirky))
    x_ND = jnp.ones((1, 8))
    weights = [m.blocks[1].mlp(x_ND).record.routing.weights_NK for m in made]
    np.testing.assert_allclose(weights[1] - weights[0], 1e-4, atol=1e-7)


def test_active_work_equals_the_dense_models() -> None:
    """Per pass and apart from routers: MLP experts as an MLP of ratio 4, heads as twice as wide."""
    sizes = {"width": 384, "depth": 2, "heads": 12}
    one = ModSquadConfig(**sizes).macs((224, 224), {"depth": 1})
    dense = ViTDenseConfig(**sizes).macs((224, 224), {"depth": 1})
    n, d = 197, 384
    more = 4 * d * d * n + 2 * n * n * d  # the plain block's attention is twice as wide
    more += 2 * d * 64 * n + 2 * n * n * d  # one head of keys and values, wider scores
    assert one.encoder - dense.encoder == more
    three = ModSquadConfig(**sizes).macs((224, 224), {"a": 1, "b": 1, "c": 1})
    stem = 3 * 16**2 * d * (n - 1)
    assert three.encoder - stem == 3 * (one.encoder - stem)
