"""Paths of a model whose attention has experts: Mod-Squad's sub-network of one task."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.deploy import calibrate, scores, task_path
from moezoo.deploy.path import unread
from moezoo.deploy.plan import Plan
from moezoo.deploy.produce import candidates
from moezoo.deploy.specialise import layers_of
from moezoo.deploy.usage import weighted_mean_outputs
from moezoo.domains.images.export import photos
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.nn import module
from moezoo.nn.context import NO_TASK
from moezoo.nn.moa import MoA
from tests import fixtures
from tests.deploy.conftest import SIZE, batches, build, single_task


@pytest.fixture(scope="module", autouse=True)
def bits_of_users() -> Iterator[None]:
    """Two programs have equal bits where the compiler joins their operations alike."""
    with fixtures.compiled_as_by_default():
        yield


CONFIG = ModSquadConfig(
    width=16,
    depth=2,
    heads=2,
    head_experts=5,
    patch=4,
    experts=6,
    top_k=2,
    head_channels=8,
    router_std=1.0,
)
TASK = "normals"
ATTENTION, MLP = "blocks/0/attn", "blocks/1/mlp"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(12, *SIZE, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def whole(model):
    return task_path.task_path(model, TASK, photos(SIZE))


@pytest.fixture(scope="module")
def found(whole, images):
    return calibrate.calibrate(whole, batches(images, 12), "calibration data")


@pytest.fixture(scope="module")
def cut(whole, found):
    kept = scores.uniform(candidates(whole, found), "frequency", 4)
    experts = {name: layer.experts for name, layer in whole.layers.items()}
    return task_path.with_stand_ins(whole, Plan(TASK, kept, experts), found)


@pytest.mark.slow
def test_the_path_is_the_model_bit_for_bit(whole, model, images) -> None:
    expected = single_task(model, TASK, images)
    np.testing.assert_array_equal(whole(images).logits, expected)


@pytest.mark.slow
def test_other_tasks_leave(whole) -> None:
    assert {name.split("/")[1] for name in whole.weights if name.startswith("heads/")} == {TASK}
    assert whole.weights["task_bias/bias"].shape == (CONFIG.width,)
    assert whole.weights[f"{ATTENTION}/router/kernel"].shape == (CONFIG.width, 5)
    assert unread(whole.call, whole.weights, whole.input.batch(1)) == []
    assert {n: (x.experts, x.chosen) for n, x in whole.layers.items()} == {
        ATTENTION: (5, 2),
        MLP: (6, 2),
    }


@pytest.mark.slow
def test_heads_are_calibrated_like_any_expert(whole, found, images) -> None:
    routing = jax.jit(whole.run)(whole.weights, images).routing
    for name, usage in found.layers.items():
        chosen = np.ravel(routing[name].experts_NK)
        expected = np.bincount(chosen, minlength=whole.layers[name].experts)
        np.testing.assert_array_equal(usage.count_E, expected)
    layer = layers_of(whole.module(whole.weights))[ATTENTION]
    x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 5, CONFIG.width)), jnp.float32)
    routing = layer.router(x_BTD.reshape(10, -1), NO_TASK)
    y_NKD = np.asarray(layer.outputs(x_BTD, routing))
    total = np.sum(np.asarray(routing.weights_NK)[..., None] * y_NKD, axis=1)
    np.testing.assert_allclose(layer(x_BTD).y_ND, total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(y_NKD, by_hand(layer, x_BTD, routing), rtol=1e-4, atol=1e-5)


def by_hand(layer, x_BTD, routing) -> np.ndarray:
    """Each chosen head's output, one token and one head at a time."""
    query, out = (np.asarray(layer.experts.stacked()[n]["kernel"]) for n in ("query", "out"))
    keys, values = np.split(np.asarray(layer.kv(x_BTD)), 2, axis=-1)
    rows = []
    for n, experts in enumerate(np.asarray(routing.experts_NK)):
        b, t = divmod(n, x_BTD.shape[1])
        for e in experts:
            scores_T = keys[b] @ (np.asarray(x_BTD)[b, t] @ query[e]) / np.sqrt(keys.shape[-1])
            weights_T = np.exp(scores_T - scores_T.max())
            rows.append((weights_T / weights_T.sum()) @ values[b] @ out[e])
    return np.reshape(rows, (*routing.experts_NK.shape, -1))


@pytest.mark.slow
def test_removed_heads_give_their_means(whole, cut, found) -> None:
    (removed,) = cut.layers[ATTENTION].removed
    full = layers_of(whole.module(whole.weights))[ATTENTION]
    less = layers_of(cut.module(cut.weights))[ATTENTION]
    assert isinstance(less, MoA)
    x_BTD = jnp.asarray(np.random.default_rng(2).normal(size=(3, 7, CONFIG.width)), jnp.float32)
    routing = full.router(x_BTD.reshape(21, -1), NO_TASK)
    y_NKD = np.array(full.outputs(x_BTD, routing))
    gone_NK = np.asarray(routing.experts_NK) == removed
    assert gone_NK.any() and not gone_NK.all()
    y_NKD[gone_NK] = weighted_mean_outputs(found.layers[ATTENTION])[removed]
    expected = np.sum(np.asarray(routing.weights_NK)[..., None] * y_NKD, axis=1)
    np.testing.assert_allclose(less(x_BTD).y_ND, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_sizes_and_bits_of_a_pruned_path(whole, cut, model, images) -> None:
    counts = [module.count(module.unflatten(p.weights)) for p in (whole, cut)]
    d, f = CONFIG.width, CONFIG.expert_hidden
    head = 2 * d * CONFIG.head_width - d  # its stand-in stays
    mlp = 2 * (2 * d * f + f + d - d)
    assert counts[0] - counts[1] == head + mlp
    prediction = cut(images)
    clean = np.asarray(prediction.violations_B) == 0
    expected = single_task(model, TASK, images)
    np.testing.assert_array_equal(prediction.logits[clean], expected[clean])
    assert np.any(prediction.logits[~clean] != expected[~clean])


@pytest.mark.slow
def test_what_a_task_uses_stays(found, whole) -> None:
    layers = candidates(whole, found)
    kept = scores.used(layers, 20.0)
    for name, usage in found.layers.items():
        share = 100 * usage.count_E / usage.count_E.sum()
        assert set(np.flatnonzero(share > 10.0)) <= set(kept[name])
        assert len(kept[name]) >= found.chosen[name]
        assert all(share[e] > 10.0 for e in kept[name]) or len(kept[name]) == 2
    assert all(len(k) == 2 for k in scores.used(layers, 100.0).values())
