"""Paths: what leaves, what stays equal, and what a removed expert changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moezoo.deploy import task_path
from moezoo.deploy.path import unread
from moezoo.deploy.plan import Plan, keep_all
from moezoo.deploy.pruned import divide
from moezoo.deploy.specialise import copy_of, layers_of
from moezoo.domains.images.export import photos
from moezoo.errors import UserError
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.nn import module, surgery
from moezoo.nn.context import NO_TASK
from moezoo.ops.expert import dense
from moezoo.ops.grouped import auto
from moezoo.ops.routing import route
from tests import fixtures
from tests.deploy.conftest import CHANNELS, CONFIG, SIZE, Case, build, constants, single_task


@pytest.fixture(scope="module", autouse=True)
def bits_of_users() -> Iterator[None]:
    """Two programs have equal bits where the compiler joins their operations alike."""
    with fixtures.compiled_as_by_default():
        yield


def scalars(weights) -> int:
    return sum(int(np.prod(w.shape)) for w in weights.values())


@pytest.mark.slow
def test_whole_path_is_the_model_bit_for_bit(case: Case) -> None:
    found = case.whole(case.images)
    np.testing.assert_array_equal(found.logits, case.full_logits)
    assert not np.any(found.violations_B)


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["task_conditioned", "single"])
def test_other_routings_too(routing: str) -> None:
    model = build(replace(CONFIG, routing=routing))
    images = np.random.default_rng(3).normal(size=(4, *SIZE, 3)).astype(np.float32)
    path = task_path.task_path(model, "normals", photos(SIZE))
    expected = single_task(model, "normals", images)
    np.testing.assert_array_equal(path(images).logits, expected)
    assert not any(name.startswith("task_embedding") for name in path.weights)


def test_other_tasks_leave_and_nothing_unread_stays(case: Case) -> None:
    heads = {name.split("/")[1] for name in case.whole.weights if name.startswith("heads/")}
    assert heads == {"semseg"}
    gone = {name.split("/")[0] for name in case.whole.absent}
    assert gone == {"heads", "tam"}
    for path in (case.whole, case.cut):
        assert unread(path.call, path.weights, path.input.batch(1)) == []
    for layer in layers_of(case.whole.module(case.whole.weights)).values():
        assert layer.router.kernel.shape == (CONFIG.width, CONFIG.experts)


def test_sizes_follow_from_the_formulas(case: Case) -> None:
    flat = module.flatten(module.split(case.model).params)
    flat |= module.flatten(module.split(case.model).stats)
    d, f, e = CONFIG.width, CONFIG.expert_hidden, CONFIG.experts
    elsewhere = sum(
        int(np.prod(a.shape))
        for name, a in flat.items()
        if name.startswith(("tam/", "heads/normals", "heads/depth"))
    )
    routers = len(case.whole.layers) * (len(CHANNELS) - 1) * d * e
    assert scalars(case.whole.weights) == scalars(flat) - elsewhere - routers
    expert = d * f + f + f * d + d
    removed = sum(len(layer.removed) for layer in case.cut.layers.values())
    assert removed == len(case.cut.layers)
    assert scalars(case.cut.weights) == scalars(case.whole.weights) - removed * (expert - d)


def test_no_violation_means_the_same_bits(case: Case) -> None:
    expected, found = case.full_logits, case.prediction
    clean = np.asarray(found.violations_B) == 0
    assert 3 <= clean.sum() <= len(clean) - 3
    np.testing.assert_array_equal(found.logits[clean], expected[clean])
    assert np.all(np.any(found.logits[~clean] != expected[~clean], axis=(1, 2, 3)))


@pytest.mark.slow
def test_violations_are_tokens_that_ask_for_a_removed_expert(case: Case) -> None:
    expected = np.zeros(len(case.images), int)
    for name, layer in case.cut.layers.items():
        experts_NK = case.routing[name].experts_NK
        for token, asked in enumerate(experts_NK):
            image = token * len(case.images) // len(experts_NK)
            expected[image] += any(int(e) in layer.removed for e in asked)
    np.testing.assert_array_equal(case.prediction.violations_B, expected)


@jax.jit
def each_expert(layer, x_ND):
    """Outputs of all experts for all tokens, [E, N, D]."""
    stacked, fn = layer.experts.stacked(), layer.experts.fn
    return jax.vmap(lambda params: fn(params, x_ND, dense))(stacked)


def test_removed_expert_gives_its_mean(case: Case) -> None:
    name = "blocks/0/mlp"
    whole = layers_of(case.whole.module(case.whole.weights))[name]
    cut = layers_of(case.cut.module(case.cut.weights))[name]
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(64, CONFIG.width)), jnp.float32)
    less = jax.jit(lambda layer, x_ND: layer(x_ND))(cut, x_ND)
    routing = jax.jit(lambda router, x_ND: router(x_ND, NO_TASK))(whole.router, x_ND)
    experts_NK, weights_NK = np.asarray(routing.experts_NK), np.asarray(routing.weights_NK)
    (removed,) = case.cut.layers[name].removed
    y_END = np.array(each_expert(whole, x_ND))
    y_END[removed] = case.means[name][removed]
    chosen_NKD = y_END[experts_NK, np.arange(64)[:, None]]
    expected = np.sum(weights_NK[..., None] * chosen_NKD, axis=1)
    np.testing.assert_allclose(less.y_ND, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(less.record.routing.experts_NK, experts_NK)


def test_keeping_all_is_exact(case: Case) -> None:
    plan = keep_all("semseg", case.plan.experts)
    kept = task_path.pruned(case.whole, plan, {})
    assert kept.exact and kept.weights.keys() == case.whole.weights.keys()
    for name, array in kept.weights.items():
        np.testing.assert_array_equal(array, case.whole.weights[name])


@pytest.mark.slow
def test_renumbering_experts_and_plan_together_changes_nothing(case: Case) -> None:
    order = np.random.default_rng(5).permutation(CONFIG.experts)
    place = np.argsort(order)  # old expert e is now number place[e]
    model = copy_of(case.model)
    for layer in layers_of(model).values():
        kernel = layer.router.kernel
        kernel.set_value(kernel.get_value()[..., order])
        layer.experts = layer.experts.take(order)
    whole = task_path.task_path(model, "semseg", photos(SIZE))
    kept = {name: tuple(sorted(int(place[e]) for e in ids)) for name, ids in case.plan.kept.items()}
    means = {name: table[order] for name, table in case.means.items()}
    moved = task_path.pruned(whole, Plan("semseg", kept, case.plan.experts), constants(means))(
        case.images
    )
    found = case.prediction
    np.testing.assert_array_equal(moved.violations_B, found.violations_B)
    np.testing.assert_allclose(moved.logits, found.logits, rtol=1e-5, atol=1e-6)


def test_cutting_leaves_the_model_alone(case: Case) -> None:
    fresh = build(CONFIG)
    before = module.flatten(module.split(fresh).params)
    after = module.flatten(module.split(case.model).params)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name])


@pytest.mark.slow
def test_a_model_without_experts_has_paths_too() -> None:
    config = ViTDenseConfig(width=16, depth=1, heads=2, patch=4, head_channels=8)
    model = build(config)
    images = np.random.default_rng(3).normal(size=(2, *SIZE, 3)).astype(np.float32)
    path = task_path.task_path(model, "depth", photos(SIZE))
    assert path.exact and not path.layers
    expected = single_task(model, "depth", images)
    np.testing.assert_allclose(path(images).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_division_of_a_routing() -> None:
    logits_NE = jnp.asarray(np.random.default_rng(0).normal(size=(40, 5)), jnp.float32)
    mask_N = np.arange(40) < 35
    routing = jax.device_get(route(logits_NE, k=3, mask_N=mask_N))
    divided = jax.device_get(divide(routing, (1, 2, 4), (0, 3)))
    for n in range(40):
        for k in range(3):
            expert, slot = int(routing.experts_NK[n, k]), int(divided.kept.experts_NK[n, k])
            assert slot == ({1: 0, 2: 1, 4: 2}.get(expert, -1))
            weight = routing.weights_NK[n, k] if slot >= 0 else 0.0
            assert divided.kept.weights_NK[n, k] == weight
            if expert in (0, 3):
                assert divided.gates_NR[n, (0, 3).index(expert)] == routing.weights_NK[n, k]
    kept, gone = divided.kept.weights_NK.sum(1), divided.gates_NR.sum(1)
    np.testing.assert_allclose(kept + gone, routing.weights_NK.sum(1), rtol=1e-6)


def test_what_does_not_fit_is_refused(case: Case) -> None:
    with pytest.raises(UserError, match="did you mean depth"):
        task_path.task_path(case.model, "dept", photos(SIZE))
    other = replace(case.plan, task="depth")
    with pytest.raises(UserError, match="plan is for task depth"):
        task_path.pruned(case.whole, other, constants(case.means))
    with pytest.raises(UserError, match="another model"):
        task_path.pruned(case.whole, Plan("semseg", {"x": (0,)}, {"x": 2}), {})
    with pytest.raises(UserError, match="pruned once"):
        task_path.pruned(case.cut, case.plan, {})


def test_a_decision_that_promises_nothing_is_refused(case: Case) -> None:
    model = copy_of(case.model)
    layer = layers_of(model)["blocks/0/mlp"]
    crowd = type("Crowd", (type(layer.router),), {"decision": "batch"})
    layer.router.__class__ = crowd
    surgery.replace(model, "blocks/0/mlp", layer)
    with pytest.raises(UserError, match="blocks/0/mlp decides by 'batch'"):
        task_path.task_path(model, "semseg", photos(SIZE))


def test_what_is_unread_is_found_where_programs_hold_kernels() -> None:
    """As on a GPU, whose kernels no export may hold."""
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    weights = {"w": jnp.ones((4, 128, 128), jnp.bfloat16), "idle": jnp.ones(3)}

    def call(weights: dict, x_ND: Any) -> Any:
        routing = route(x_ND[:, :4].astype(jnp.float32), k=2)
        return auto(lambda p, x, linear: linear(x, p["w"]), {"w": weights["w"]}, x_ND, routing)

    with jax.sharding.use_abstract_mesh(mesh):
        assert unread(call, weights, jax.ShapeDtypeStruct((256, 128), "bfloat16")) == ["idle"]
