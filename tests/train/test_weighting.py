"""Learned weights of tasks, and the loss that judges the table of tasks and experts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moezoo.domains.images.data import batches
from moezoo.domains.images.domain import DataConfig
from moezoo.nn.moe import Record
from moezoo.ops import balance
from moezoo.ops.routing import Routing, route
from moezoo.train import mesh as meshes
from moezoo.train import placement, state, step
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.config import MeshConfig, to_json
from moezoo.train.domain import Classes
from moezoo.train.setup import make_builder, make_tasks
from tests.train import tiny

RATE = 0.1

READ = DataConfig().domain.read


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """One step of plain SGD with learned weights: metrics, state, and the state read back."""
    folder: Path = tmp_path_factory.mktemp("weighting")
    config = tiny.config("unused", model=tiny.dense(depth=1))
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    tasks = make_tasks(config, Classes({"semseg": tiny.CLASSES}))
    source = batches.training(tiny.source(), 8, 0, config.tasks)
    optimiser = optax.sgd(RATE)
    with jax.set_mesh(mesh):
        extra = partial(state.sigmas, len(tasks))
        made = state.create(make_builder(config, tasks), optimiser, mesh, placement.DEFAULT, extra)
        loss = step.make_loss(made.definition, tasks, {}, READ)
        update = step.make_step(made.definition, loss, optimiser, made.shardings, 0)
        new, metrics = update(made.state, meshes.place(mesh, source.batch(0), 8))
        with Checkpointer(folder, to_json(config), 1, print) as checkpoints:
            checkpoints.save(1, new, None)
            checkpoints.wait()
            again = checkpoints.restore(1, state.target(new, made.shardings))
    return tasks, jax.device_get(metrics), jax.device_get(new), jax.device_get(again)


@pytest.mark.slow
def test_sigmas_follow_their_gradient(learned: tuple) -> None:
    tasks, metrics, new, _ = learned
    for j, task in enumerate(tasks):
        weighted = task.weight * metrics[f"loss/{task.name}"]
        slope = -weighted + 1.0  # of 0.5 L / sigma^2 + log(1 + sigma^2) at sigma = 1
        np.testing.assert_allclose(new["weighting"]["sigma"][j], 1.0 - RATE * slope, rtol=1e-5)
        assert metrics[f"sigma/{task.name}"] == 1.0
    total = sum(t.weight * metrics[f"loss/{t.name}"] for t in tasks)
    expected = 0.5 * total + len(tasks) * np.log(2.0)
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-5)


@pytest.mark.slow
def test_sigmas_are_in_checkpoints(learned: tuple) -> None:
    _, _, new, again = learned
    np.testing.assert_array_equal(again["weighting"]["sigma"], new["weighting"]["sigma"])
    assert not np.array_equal(new["weighting"]["sigma"], np.ones(2))


def test_states_without_learned_weights_are_as_before() -> None:
    config = tiny.config("unused", model=tiny.dense(depth=1))
    tasks = make_tasks(config, Classes({"semseg": tiny.CLASSES}))
    made = state.abstract(make_builder(config, tasks), optax.adam(1e-3))
    assert set(made.state) == {"params", "stats", "optimiser", "step"}
    assert jax.tree.structure(made.state["optimiser"][0].mu) == jax.tree.structure(
        made.state["params"]
    )


def routing_of(experts: list[int], count: int) -> Routing:
    logits_NE = 50.0 * jax.nn.one_hot(jnp.asarray(experts), count)
    return route(logits_NE, k=1)


@pytest.mark.slow
def test_mutual_information_judges_all_tasks_together() -> None:
    task_N = jnp.array([0, 0, 1, 1])
    nothing = jnp.zeros((), jnp.int32)
    apart = Record(routing_of([0, 0, 1, 1], 2), task_N, nothing)
    same = Record(routing_of([0, 1, 0, 1], 2), task_N, nothing)
    loss = step.mutual_information_loss
    np.testing.assert_allclose(loss({"a": apart}, 2), -np.log(2.0), rtol=1e-5)
    np.testing.assert_allclose(loss({"a": apart, "b": same}, 2), -np.log(2.0), rtol=1e-5)
    np.testing.assert_allclose(loss({"b": same}, 2), 0.0, atol=1e-6)


@pytest.mark.slow
def test_slices_of_a_batch_never_look_less_informative() -> None:
    """What accumulation averages is an upper bound of the batch's mutual information."""
    rng = np.random.default_rng(0)
    sums_SJE = jnp.asarray(rng.dirichlet(np.ones(6), size=(4, 3)), jnp.float32)
    slices = jax.vmap(balance.mutual_information)(sums_SJE)
    whole = balance.mutual_information(sums_SJE.sum(0))
    assert float(slices.mean()) > float(whole) > 0
