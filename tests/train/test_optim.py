"""Optimisers and schedules against the papers' reference numbers and hand calculation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moezoo.errors import UserError
from moezoo.train import optim
from moezoo.train.optim import OptimConfig
from tests.fixtures import load

PARAMS = {
    "layer": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.5, -0.5])},
    "norm": {"scale": jnp.ones(2)},
    "experts": {"bias": jnp.ones((3, 2))},
    "pos_embed": jnp.ones((1, 5, 2)),
}


def run(transformation, params, gradients):
    """The parameters after each gradient."""
    state = transformation.init(params)
    history = []
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history


def test_poly_per_epoch_equals_the_reference():
    data = load("m3vit", "misc")
    rates, base = data["poly_lr"], float(data["poly_base"])
    per_epoch = 7
    schedule = optim.poly_schedule(base, len(rates) * per_epoch, hold=per_epoch)
    for step in range(len(rates) * per_epoch):
        expected = rates[step // per_epoch]
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-4, atol=1e-9)


def test_sgd_is_torch_sgd():
    config = OptimConfig("sgd", 0.1, "constant", momentum=0.9, weight_decay=0.01, decay="all")
    gradients = [jax.tree.map(lambda x, i=i: x * 0.3 + i, PARAMS) for i in range(4)]
    history = run(optim.build(config, 10), PARAMS, gradients)
    for path in (("layer", "kernel"), ("layer", "bias"), ("norm", "scale")):
        pick = lambda tree, path=path: np.asarray(tree[path[0]][path[1]], np.float64)  # noqa: E731
        value, velocity = pick(PARAMS), np.zeros_like(pick(PARAMS))
        for gradient, params in zip(gradients, history, strict=True):
            velocity = 0.9 * velocity + (pick(gradient) + 0.01 * value)
            value = value - 0.1 * velocity
            np.testing.assert_allclose(pick(params), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_matrices_decay_and_nothing_else(kind):
    config = OptimConfig(kind, 0.1, "constant", weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    after = run(optim.build(config, 10), PARAMS, [zeros])[0]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), PARAMS, after)
    assert moved["layer"] == {"kernel": True, "bias": False}
    assert not any(jax.tree.leaves({k: v for k, v in moved.items() if k != "layer"}))


def test_adamw_decays_apart_from_the_gradient():
    config = OptimConfig("adamw", 0.1, "constant", weight_decay=0.5, decay="all")
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    after = run(optim.build(config, 10), PARAMS, [zeros])[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(b, a * (1 - 0.05), rtol=1e-5), PARAMS, after
    )


@pytest.mark.parametrize("kind", ["poly", "cosine", "constant"])
def test_warmup_rises_then_the_schedule_falls(kind):
    config = OptimConfig(lr=0.2, schedule=kind, warmup=10)
    rates = np.array([optim.schedule(config, 100)(i) for i in range(101)])
    assert rates[0] > 0
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11) / 10, rtol=1e-5)
    np.testing.assert_allclose(rates[10], 0.2, rtol=1e-5)
    falls = np.diff(rates[10:])
    assert (falls <= 0).all() and (kind == "constant") == (rates[100] > 0)


def test_clip_bounds_the_gradient():
    config = OptimConfig("sgd", 1.0, "constant", momentum=0.0, clip=2.0)
    big = jax.tree.map(lambda x: 100 * x, PARAMS)
    after = run(optim.build(config, 10), PARAMS, [big])[0]
    moved = optax.global_norm(jax.tree.map(lambda a, b: a - b, PARAMS, after))
    np.testing.assert_allclose(moved, 2.0, rtol=1e-4)


@pytest.mark.parametrize(
    "change, part",
    [
        ({"kind": "adamm"}, "adamw"),
        ({"schedule": "polly"}, "poly"),
        ({"decay": "matrix"}, "matrices"),
    ],
)
def test_unknown_name_is_a_user_error(change, part):
    with pytest.raises(UserError, match=part):
        optim.build(OptimConfig(**change), 10)


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.0},
        {"lr": float("nan")},
        {"warmup": 10},
        {"hold": 0},
        {"clip": 0.0},
        {"b1": 1.0},
        {"weight_decay": -1.0},
    ],
)
def test_impossible_numbers_are_user_errors(change):
    with pytest.raises(UserError, match=f"optimiser.{next(iter(change))}"):
        optim.check(OptimConfig(**change), 10)
    optim.check(OptimConfig(), 10)
