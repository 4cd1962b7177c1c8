"""The training step: its losses, its gradients over slices and meshes, what it leaves alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.domains.images.data import batches
from moezoo.domains.images.domain import DataConfig
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.nn import module, surgery
from moezoo.nn.exploration import BalancedRouter
from moezoo.nn.module import flatten
from moezoo.nn.moe import Record
from moezoo.ops import balance
from moezoo.ops.routing import Routing
from moezoo.train import mesh as meshes
from moezoo.train import placement, state, step
from moezoo.train.config import MeshConfig, TrainConfig
from moezoo.train.domain import Classes
from moezoo.train.setup import make_builder, make_tasks
from tests.tasks.tables import build
from tests.train import tiny

CLASSES = {"semseg": tiny.CLASSES}

READ = DataConfig().domain.read


WEIGHTS = {"importance": 0.01, "load": 0.0}


def run(
    config: Any,
    sizes: MeshConfig,
    devices: int,
    steps: int = 2,
    weights: dict[str, float] = WEIGHTS,
    rules: placement.Rules = placement.DEFAULT,
) -> tuple[list[dict], dict]:
    """Metrics of the first steps and the parameters after them."""
    mesh = meshes.make_mesh(sizes, jax.devices()[:devices])
    tasks = make_tasks(config, Classes(CLASSES))
    optimiser = optax.sgd(0.05, momentum=0.9)
    source = batches.training(tiny.source(), config.train.batch, 0, config.tasks)
    seen = []
    with jax.set_mesh(mesh):
        made = state.create(make_builder(config, tasks), optimiser, mesh, rules)
        loss = step.make_loss(made.definition, tasks, weights, READ)
        update = step.make_step(
            made.definition,
            loss,
            optimiser,
            made.shardings,
            0,
            config.train.gradient_accumulation,
            lay=placement.like_moments(mesh, rules),
        )
        current = made.state
        for at in range(steps):
            batch = meshes.place(mesh, source.batch(at), config.train.batch)
            current, metrics = update(current, batch)
            seen.append({name: float(value) for name, value in metrics.items()})
    return seen, jax.tree.map(np.asarray, current)


@pytest.fixture(scope="module")
def alone() -> tuple[list[dict], dict]:
    return run(tiny.config("unused"), MeshConfig(), 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "split"),
    [
        (MeshConfig(data=2, expert=4), "with_parameters"),
        (MeshConfig(data=2, fsdp=2, expert=2), "with_parameters"),
        (MeshConfig(data=1, expert=2), "with_parameters"),
        (MeshConfig(data=1, fsdp=2, tensor=2), "with_parameters"),
        (MeshConfig(data=4, fsdp=2), "over_data"),
    ],
    ids=["data2-expert4", "data2-fsdp2-expert2", "expert2", "fsdp2-tensor2", "moments-over-data"],
)
def test_every_mesh_trains_the_same(sizes: MeshConfig, split: str, alone: tuple) -> None:
    devices = sizes.data * sizes.fsdp * sizes.expert * sizes.tensor
    metrics, final = run(tiny.config("unused"), sizes, devices, rules=placement.TABLES[split])
    for one, many in zip(alone[0], metrics, strict=True):
        assert one.keys() == many.keys()
        for name in one:
            np.testing.assert_allclose(many[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    here, there = flatten(alone[1]["params"]), flatten(final["params"])
    for path in here:
        np.testing.assert_allclose(there[path], here[path], rtol=1e-4, atol=1e-5, err_msg=path)
    stats = flatten(final["stats"])
    for path, value in flatten(alone[1]["stats"]).items():
        np.testing.assert_allclose(stats[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_mutual_information_is_that_of_the_whole_batch_on_every_mesh() -> None:
    """Attention experts, too: Mod-Squad with its loss on one device and on eight."""
    sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "head_channels": 8}
    model = ModSquadConfig(**sizes, head_experts=4, experts=4, top_k=2)
    config, weights = tiny.config("unused", model=model), {"mutual_information": 0.1}
    alone = run(config, MeshConfig(), 1, weights=weights)
    many = run(config, MeshConfig(data=2, expert=4), 8, weights=weights)
    assert alone[0][0]["balance/mutual_information"] < -1e-6
    for one, other in zip(alone[0], many[0], strict=True):
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-4, atol=1e-5, err_msg=name)
    there = flatten(many[1]["params"])
    for path, value in flatten(alone[1]["params"]).items():
        np.testing.assert_allclose(there[path], value, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_parameters_lie_on_their_axes() -> None:
    config = tiny.config("unused")
    mesh = meshes.make_mesh(MeshConfig(data=2, expert=4), jax.devices()[:8])
    tasks = make_tasks(config, Classes(CLASSES))
    made = state.create(make_builder(config, tasks), optax.adam(1e-3), mesh, placement.DEFAULT)
    kernel = made.state["params"]["blocks"]["1"]["mlp"]["experts"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[0] == kernel.shape[0] // 4


def test_slices_of_a_batch_give_the_gradient_of_the_batch() -> None:
    """With BatchNorm in the heads slices see other statistics, so the heads are left out."""

    def loss(params: dict, stats: dict, batch: dict, key: jax.Array):
        value = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
        return value, step.PassRecord({"loss/total": value}, stats, {})

    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(8, 3)), "y": rng.normal(size=8)}
    batch = {k: jnp.asarray(v, jnp.float32) for k, v in batch.items()}
    optimiser = optax.sgd(0.1)
    ended = []
    for parts in (1, 2, 4):
        params = {"w": jnp.ones(3)}
        current = {"params": params, "stats": {}, "optimiser": optimiser.init(params)}
        current["step"] = jnp.zeros((), jnp.int32)
        new, metrics = step.make_step(None, loss, optimiser, None, 0, parts)(current, batch)
        ended.append((np.asarray(new["params"]["w"]), float(metrics["loss/total"])))
    for weights, value in ended[1:]:
        np.testing.assert_allclose(weights, ended[0][0], rtol=1e-5)
        np.testing.assert_allclose(value, ended[0][1], rtol=1e-5)


@pytest.mark.parametrize("odd", ["loss", "gradient", "update"])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(odd: str) -> None:
    def loss(params: dict, stats: dict, batch: dict, key: jax.Array):
        # At 0 the root is finite and its slope is not.
        value = jnp.sum(jnp.sqrt(params["w"] - batch["x"])) + jnp.sum(params["w"])
        seen = {"seen": stats["seen"] + batch["x"].sum()}
        return value, step.PassRecord({"loss/total": value}, seen, {})

    optimiser = optax.adam(optax.linear_schedule(1.0, 0.5, 10))
    params = {"w": jnp.ones(3)}

    def fresh() -> dict[str, Any]:
        made = {
            "params": params,
            "stats": {"seen": jnp.zeros(())},
            "step": jnp.zeros((), jnp.int32),
        }
        return jax.tree.map(jnp.array, made | {"optimiser": optimiser.init(params)})

    bad = {"loss": 2.0, "gradient": 1.0, "update": 0.5}[odd]
    scaled = optax.chain(optimiser, optax.scale(1e30)) if odd == "update" else None
    chosen = scaled or optimiser

    def begun() -> dict[str, Any]:
        return fresh() | {"optimiser": jax.tree.map(jnp.array, chosen.init(params))}

    update = step.make_step(None, loss, chosen, None, 0)
    new, metrics = update(begun(), {"x": jnp.full(3, bad)})
    assert bool(metrics["skipped"]) and int(new["step"]) == 1
    before = begun()
    for part in ("params", "stats"):
        jax.tree.map(np.testing.assert_array_equal, new[part], before[part])
    for a, b in zip(*(jax.tree.leaves(s["optimiser"]) for s in (new, before)), strict=True):
        number = jnp.issubdtype(a.dtype, jnp.integer)
        np.testing.assert_array_equal(a, b + 1 if number else b)
    if odd == "update":
        return
    # The next one moves: by the same bits as if the other had never been, but for the numbers.
    new, metrics = update(new, {"x": jnp.full(3, 0.5)})
    assert not bool(metrics["skipped"]) and np.isfinite(new["params"]["w"]).all()
    assert np.any(np.asarray(new["params"]["w"]) != 1.0)
    plain = step.make_step(None, loss, optimiser, None, 0, keep=step.always)
    new, metrics = plain(fresh(), {"x": jnp.full(3, bad)})
    assert "skipped" not in metrics and not np.isfinite(new["params"]["w"]).all()


def test_slices_are_averaged_and_their_counts_added() -> None:
    def gradient(params: Any, stats: Any, piece: Any, key: Any) -> Any:
        metrics = {"loss/total": piece["x"].mean(), "dropped": (piece["x"] > 2).sum()}
        return (metrics["loss/total"], step.PassRecord(metrics, stats, {})), params

    batch = {"x": jnp.array([1.0, 3.0, 4.0, 5.0])}
    (loss, seen), grads = step._accumulated(gradient, 2)(jnp.ones(2), {}, batch, jax.random.key(0))
    assert float(loss) == 3.25 and grads.tolist() == [1.0, 1.0]
    assert int(seen.metrics["dropped"]) == 3


def test_more_slices_hold_no_more_gradients() -> None:
    """Each slice's gradients were kept beside those of all others: slices cost memory."""
    params = {"w": jnp.ones((256, 256), jnp.bfloat16)}

    def loss(params: dict, stats: dict, batch: dict, key: jax.Array):
        value = jnp.mean((batch["x"] @ params["w"].astype(jnp.float32)) ** 2)
        return value, step.PassRecord({"loss/total": value}, stats, {})

    gradient = jax.value_and_grad(loss, has_aux=True)
    batch = {"x": jax.random.normal(jax.random.key(0), (16, 256))}
    held, found = [], []
    for parts in (2, 16):
        run = jax.jit(step._accumulated(gradient, parts))
        compiled = run.lower(params, {}, batch, jax.random.key(0)).compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
        found.append(compiled(params, {}, batch, jax.random.key(0))[1]["w"])
        assert found[-1].dtype == jnp.bfloat16
    assert held[1] < held[0] + params["w"].nbytes, held
    two, sixteen = (np.asarray(w, np.float32) for w in found)
    np.testing.assert_allclose(two, sixteen, 2**-6, 2**-9)


@pytest.mark.slow
def test_accumulation_trains_a_model() -> None:
    config = tiny.config("unused")
    config = replace(config, train=TrainConfig(steps=2, batch=8, gradient_accumulation=2))
    metrics, final = run(config, MeshConfig(), 1)
    assert int(final["step"]) == 2
    assert all(np.isfinite(row["loss/total"]) for row in metrics)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 1])
def test_a_balancing_bias_moves_once_per_step_whatever_the_slices(parts: int) -> None:
    tasks = make_tasks(replace(tiny.config("unused"), tasks=("depth",)), Classes(CLASSES))
    config = tiny.model(routing="single", experts=8)
    model = config.build({"depth": 1}, tiny.SIZE, nnx.Rngs(0))
    router = BalancedRouter(config.width, 8, 2, rate=0.1, rngs=nnx.Rngs(1))
    surgery.replace(model, "blocks/1/mlp/router", router)
    source = tiny.source()
    batch = {name: jnp.asarray(source.arrays[name][:8]) for name in ("image", "depth")}
    record = model(batch["image"]).records["blocks/1/mlp"]
    counts_E = np.bincount(np.ravel(record.routing.experts_NK), minlength=8)
    expected_E = 0.1 * np.sign(counts_E.mean() - counts_E)
    assert expected_E.any()
    definition, params, stats = module.split(model)
    optimiser = optax.sgd(0.1)
    loss = step.make_loss(definition, tasks, {}, READ)
    current = {"params": params, "stats": stats, "optimiser": optimiser.init(params)}
    current = jax.tree.map(jnp.array, current | {"step": jnp.zeros((), jnp.int32)})
    new, _ = step.make_step(definition, loss, optimiser, None, 0, parts)(current, batch)
    bias_E = new["stats"]["blocks"]["1"]["mlp"]["router"]["bias"]
    np.testing.assert_allclose(bias_E, expected_E, rtol=1e-6)


@pytest.mark.slow
def test_balance_is_judged_per_task() -> None:
    """Two tasks, each with one expert of its own: unbalanced apart, balanced together."""
    experts_NK = jnp.array([[0], [0], [1], [1]], jnp.int32)
    probs = jax.nn.one_hot(experts_NK[:, 0], 2)
    weights = jnp.ones((4, 1))
    routing = Routing(
        experts_NK, weights, probs, probs, probs, jnp.zeros((1, 1)), jnp.ones(4, bool)
    )
    apart = Record(routing, jnp.array([0, 0, 1, 1]), jnp.zeros((), jnp.int32))
    together = Record(routing, jnp.zeros(4, jnp.int32), jnp.zeros((), jnp.int32))
    assert float(step.balance_loss({"a": apart}, 2, balance.importance_loss)) > 1.0
    assert float(step.balance_loss({"a": together}, 2, balance.importance_loss)) == 0.0


@pytest.mark.slow
def test_weights_multiply_tasks_and_auxiliary_predictions_count() -> None:
    tasks = tuple(build(name) for name in ("normals", "depth"))
    rng = np.random.default_rng(1)
    label = {"depth": jnp.ones((2, 4, 4)), "normals": jnp.ones((2, 4, 4, 3)) / 3**0.5}
    predicted = {
        "depth": jnp.asarray(rng.normal(size=(2, 4, 4, 1)), jnp.float32),
        "normals": jnp.asarray(rng.normal(size=(2, 4, 4, 3)), jnp.float32),
    }
    losses, total = step.task_losses(predicted, {}, label, tasks)
    expected = sum(task.weight * float(losses[task.name]) for task in tasks)
    np.testing.assert_allclose(float(total), expected, rtol=1e-6)
    extra = {"depth": (predicted["depth"], predicted["depth"])}
    _, more = step.task_losses(predicted, extra, label, tasks)
    depth = next(task for task in tasks if task.name == "depth")
    np.testing.assert_allclose(
        float(more), expected + 2 * depth.weight * float(losses["depth"]), rtol=1e-6
    )
