"""M3ViT in its three routings: batching of tasks, sharing, precision, sharding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moezoo.errors import UserError
from moezoo.models.m3vit.model import ROUTERS
from moezoo.nn import module
from tests.models.tiny import BATCH, SIZE, TASKS, call, config, image, parts_of, quick_jit

ROUTINGS = list(ROUTERS)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def model_of(routing: str, **changes) -> module.ModuleParts:
    return parts_of(config(routing=routing, **changes))


@functools.cache
def all_tasks(routing: str):
    return call(model_of(routing))


@pytest.mark.parametrize("routing", ROUTINGS)
def test_predictions_have_image_resolution_and_float32(routing):
    output = all_tasks(routing)
    assert set(output.predictions) == set(TASKS) and not output.auxiliary
    for task, channels in TASKS.items():
        logits = output.predictions[task]
        assert logits.shape == (BATCH, *SIZE, channels) and logits.dtype == jnp.float32
        assert jnp.isfinite(logits).all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_records_carry_the_task_of_every_token(routing):
    records = all_tasks(routing).records
    assert list(records) == ["blocks/1/mlp"]
    tokens = 1 + (SIZE[0] // 4) * (SIZE[1] // 4)
    for record in records.values():
        rows = [0] if routing == "single" else range(len(TASKS))
        wanted = np.repeat(np.tile(rows, BATCH), tokens)
        np.testing.assert_array_equal(record.task_N, wanted)
        assert record.routing.experts_NK.shape == (len(wanted), 2)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_one_task_alone_equals_its_part_of_all_tasks(routing):
    together = all_tasks(routing)
    for index, task in enumerate(TASKS):
        alone = call(model_of(routing), tasks=(task,))
        assert set(alone.predictions) == {task}
        np.testing.assert_allclose(alone.predictions[task], together.predictions[task], **CLOSE)
        for path, record in alone.records.items():
            assert record.task_N.tolist() == [index] * len(record.task_N)
            whole = together.records[path]
            mine = np.asarray(whole.task_N) == (0 if routing == "single" else index)
            chosen = np.asarray(whole.routing.experts_NK)[mine]
            np.testing.assert_array_equal(record.routing.experts_NK, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["multi_gate", "task_conditioned"])
def test_gradients_equal_those_of_one_pass_per_task(routing):
    parts = model_of(routing)

    def loss(params, passes):
        total = jnp.zeros(())
        for tasks in passes:
            model = module.merge(parts.definition, params, parts.stats)
            output = model(image(), tasks=tasks, train=True)
            total += sum(jnp.sum(jnp.sin(p)) for p in output.predictions.values())
        return total

    gradient = quick_jit(jax.value_and_grad(loss), static_argnums=1)
    value, together = gradient(parts.params, (tuple(TASKS),))
    looped_value, looped = gradient(parts.params, tuple((task,) for task in TASKS))
    np.testing.assert_allclose(value, looped_value, **CLOSE)
    flat = module.flatten(together)
    for path, leaf in flat.items():
        scale = float(jnp.abs(leaf).max())
        # A bias in front of a batch norm has gradient 0 up to the rounding of terms that cancel;
        # how large those are its kernel's gradient shows.
        terms = max(scale, float(jnp.abs(flat.get(path.replace("bias", "kernel"), leaf)).max()))
        wanted = module.flatten(looped)[path]
        np.testing.assert_allclose(leaf, wanted, rtol=1e-3, atol=1e-4 * terms + 1e-5, err_msg=path)
        assert scale > 0 or path.startswith(("heads", "blocks/1/mlp/router")), path


def test_the_order_of_requested_tasks_does_not_matter():
    mixed = call(model_of("multi_gate"), tasks=("depth", "semseg"))
    assert list(mixed.records["blocks/1/mlp"].task_N[:20:9]) == [1, 0, 1]
    for task in ("depth", "semseg"):
        wanted = all_tasks("multi_gate").predictions[task]
        np.testing.assert_allclose(mixed.predictions[task], wanted, **CLOSE)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_what_tasks_share_is_computed_once(routing):
    parts = model_of(routing)

    def qkv_rows(jaxpr) -> list[int]:
        shapes = [v.aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"
                  for v in e.outvars]  # fmt: skip
        return [s[0] for s in shapes if len(s) == 3 and s[-1] == 3 * 8]

    jaxpr = jax.make_jaxpr(lambda p, x: module.merge(parts.definition, p, parts.stats)(x))(
        parts.params, image()
    )
    later = BATCH if routing == "single" else BATCH * len(TASKS)
    assert qkv_rows(jaxpr.jaxpr) == [BATCH, BATCH, later]


@pytest.mark.slow
def test_all_experts_may_be_chosen():
    output = call(parts_of(config(experts=3, top_k=3)))
    assert all(jnp.isfinite(p).all() for p in output.predictions.values())
    routing = output.records["blocks/1/mlp"].routing
    np.testing.assert_allclose(routing.weights_NK.sum(1), 1.0, rtol=1e-5)


def test_a_single_expert_is_no_choice():
    with pytest.raises(UserError, match="nothing to choose"):
        config(experts=1, top_k=1)


def test_a_model_of_one_task_has_no_task_rows():
    parts = parts_of(config(), {"depth": 1})
    output = call(parts)
    assert output.records["blocks/1/mlp"].task_N.shape == (BATCH * 9,)
    assert output.predictions["depth"].shape == (BATCH, *SIZE, 1)


@pytest.mark.slow
def test_routers_may_see_the_tokens_before_attention():
    ahead = model_of("multi_gate", gate_input_ahead=True)
    output = call(ahead)
    wanted = all_tasks("multi_gate").records["blocks/1/mlp"].routing.logits_NE
    assert not np.allclose(output.records["blocks/1/mlp"].routing.logits_NE, wanted)
    alone = call(ahead, tasks=("depth",))
    np.testing.assert_allclose(alone.predictions["depth"], output.predictions["depth"], **CLOSE)


@pytest.mark.slow
def test_bfloat16_stays_close_with_float32_routers_and_predictions():
    # Every expert is chosen, so rounding cannot change a choice.
    wide = config(experts=2, top_k=2)
    exact = call(parts_of(wide))
    half = call(parts_of(config(experts=2, top_k=2, dtype="bfloat16")))
    for task in TASKS:
        a, b = exact.predictions[task], half.predictions[task]
        assert b.dtype == jnp.float32 and jnp.isfinite(b).all()
        assert float(jnp.abs(a - b).max()) < 0.1 * float(jnp.abs(a).max())
        assert not np.array_equal(a, b)
    assert half.records["blocks/1/mlp"].routing.logits_NE.dtype == jnp.float32


@pytest.mark.slow
def test_noise_and_stochastic_depth_act_in_training_with_a_key_only():
    parts = parts_of(config(noise_std=4.0, drop_path=0.5))
    quiet = [call(parts, key=key).predictions["depth"] for key in (None, jax.random.key(1))]
    np.testing.assert_array_equal(*quiet)
    train = functools.partial(call, parts, train=True)
    first, again, other = (train(key=jax.random.key(k)) for k in (1, 1, 2))
    np.testing.assert_array_equal(first.predictions["depth"], again.predictions["depth"])
    assert not np.allclose(first.predictions["depth"], other.predictions["depth"])
    routing = first.records["blocks/1/mlp"].routing
    np.testing.assert_allclose(routing.noise_scale_NE, 1.0)
    assert not np.allclose(routing.noisy_NE, routing.logits_NE)


@pytest.mark.slow
def test_other_image_sizes_resize_the_positions():
    larger = call(model_of("multi_gate"), image((16, 16), 2), tasks=("depth",))
    assert larger.predictions["depth"].shape == (2, 16, 16, 1)
    same = call(model_of("multi_gate"), image(SIZE, 2), tasks=("depth",))
    wanted = all_tasks("multi_gate").predictions["depth"].shape[1:]
    assert same.predictions["depth"].shape[1:] == wanted


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    parts = model_of("multi_gate")

    def loss(params, stats, x):
        model = module.merge(parts.definition, params, stats)
        output = model(x, train=True)
        total = sum(jnp.mean(jnp.sin(p)) for p in output.predictions.values())
        return total, (output.predictions, module.updated_stats(model))

    run = quick_jit(jax.value_and_grad(loss, has_aux=True))
    (wanted, wanted_aux), wanted_grads = run(parts.params, parts.stats, image())
    axes = ("data", "fsdp", "expert", "tensor")
    mesh = jax.make_mesh((2, 1, 4, 1), axes, axis_types=(AxisType.Auto,) * 4)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp", "expert")))

    def place(path, leaf):
        inside = any(getattr(p, "key", "") == "experts" for p in path)
        spec = PartitionSpec("expert") if inside else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        params, stats = jax.tree_util.tree_map_with_path(place, (parts.params, parts.stats))
        (value, aux), grads = run(params, stats, jax.device_put(image(), rows))
    np.testing.assert_allclose(value, wanted, **CLOSE)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **CLOSE), aux, wanted_aux)
    for path, leaf in module.flatten(grads).items():
        given = module.flatten(wanted_grads)[path]
        atol = 1e-4 * float(jnp.abs(given).max()) + 1e-6
        np.testing.assert_allclose(leaf, given, rtol=1e-3, atol=atol, err_msg=path)


def test_equal_configurations_give_equal_definitions():
    options = {"noise_std": 1.0, "dispatch": "capacity"}
    first, second = (
        module.abstract(lambda: config(**options).build(TASKS, SIZE, nnx.Rngs(0))).definition
        for _ in range(2)
    )
    assert first == second and hash(first) == hash(second)


def test_reference_quirks_are_initialisations():
    sound, quirky = (
        config(reference_quirks=quirks).make_mlp(2)(1, nnx.Rngs(0))
        for quirks in ((), ("expert_init", "router_init"))
    )
    flat, quirk = (module.flatten(module.split(moe).params) for moe in (sound, quirky))
    path = "experts/fc1/kernel"
    assert flat[path].std() > 0.015 and jnp.abs(quirk[path]).max() <= 1 / np.sqrt(8 * 8)
    path = "router/kernel"
    assert jnp.abs(flat[path]).max() <= 0.04 and jnp.abs(quirk[path]).max() > 0.3


def test_building_shapes_allocates_nothing():
    before = jax.live_arrays()  # held, so that none of them ends meanwhile
    large = config(width=1024, depth=24, heads=16, patch=16, head_channels=256)
    shapes = module.abstract(lambda: large.build(TASKS, (480, 640), nnx.Rngs(0)))
    assert len(jax.live_arrays()) == len(before)
    assert module.count(shapes.params) > 200_000_000
