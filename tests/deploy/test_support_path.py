"""A path out of routers with supports: experts leave, and not a bit changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.deploy import calibrate, certificate, task_path
from moezoo.deploy.plan import Plan
from moezoo.deploy.produce import candidates
from moezoo.deploy.scores import uniform
from moezoo.deploy.specialise import layers_of
from moezoo.domains.images.export import photos
from moezoo.errors import UserError
from moezoo.nn.support import SupportConfig
from tests import fixtures
from tests.deploy.conftest import CHANNELS, CONFIG, SIZE, batches, build, single_task

TASK = "depth"
OPEN = {
    name: (np.arange(6) + shift) % 2 == 0
    for name, shift in (("blocks/0/mlp", 0), ("blocks/1/mlp", 1))
}


@pytest.fixture(scope="module", autouse=True)
def bits_of_users() -> Iterator[None]:
    with fixtures.compiled_as_by_default():
        yield


@pytest.fixture(scope="module")
def model():
    model = build(replace(CONFIG, support=SupportConfig(3, 5)))
    task = list(CHANNELS).index(TASK)
    for name, layer in layers_of(model).items():
        state = layer.router.support.open  # type: ignore[attr-defined]
        rows = np.ones(state.get_value().shape, np.float32)
        rows[task] = OPEN[name]
        state.set_value(jnp.asarray(rows))
    return model


@pytest.fixture(scope="module")
def whole(model):
    return task_path.task_path(model, TASK, photos(SIZE))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(16, *SIZE, 3)).astype(np.float32)


def test_unreachable_experts_leave_and_no_bit_changes(model, whole, images) -> None:
    prediction = whole(images)
    np.testing.assert_array_equal(prediction.logits, single_task(model, TASK, images))
    assert not np.asarray(prediction.violations_B).any()
    for name, layer in whole.layers.items():
        assert layer.kept == tuple(np.flatnonzero(OPEN[name])) and layer.missing == ()
        assert layer.kind == "exact_support" and layer.decision == "task_support"
        assert whole.weights[f"{name}/experts/fc1/kernel"].shape[0] == 3
    assert not [name for name in whole.weights if "support" in name]
    stated = certificate.contents(whole)
    assert stated["kind"] == "exact" and "outside of the" in stated["statement"]
    assert {layer["kind"] for layer in stated["layers"].values()} == {"exact_support"}


def test_experts_inside_the_support_can_still_be_pruned(whole, images) -> None:
    found = calibrate.calibrate(whole, batches(images, 8), "data")
    for name, usage in found.layers.items():
        assert not usage.count_E[~OPEN[name]].any() and usage.count_E[OPEN[name]].all()
    kept = uniform(candidates(whole, found), "reap", 2)
    experts = {name: layer.experts for name, layer in whole.layers.items()}
    plan = Plan(TASK, kept, experts, novices="mean")
    cut = task_path.with_stand_ins(whole, plan, found)
    assert {layer.kind for layer in cut.layers.values()} == {"pruned"}
    assert all(len(layer.missing) == 1 for layer in cut.layers.values())
    prediction = cut(images)
    clean = np.asarray(prediction.violations_B) == 0
    np.testing.assert_array_equal(prediction.logits[clean], whole(images).logits[clean])
    assert not clean.all()
    outside = {name: (0, 1) for name in kept}
    with pytest.raises(UserError, match="no token of depth can ask for"):
        task_path.with_stand_ins(whole, replace(plan, kept=outside), found)
