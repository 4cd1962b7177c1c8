"""Gradients of single tasks made alike: their length, and Adam's moments written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moezoo.domains.pairs import tasks as similar
from moezoo.train.optim import as_is, normalised, scale_by_shared_adam

TASKS = (similar.choice("scene", 3), similar.words("mlm", 4, weight=0.5))


def steps(count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [{"a": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)} for _ in range(count)]


def test_as_is_changes_nothing():
    grads = steps(1)[0]
    same, told = as_is(grads, {"image": None})
    assert same is grads and told == {}


@pytest.mark.parametrize(("task", "length", "share"), [("scene", 1.0, 0.75), ("mlm", 0.5, 0.25)])
def test_gradients_have_the_length_of_the_tasks_weight(task, length, share):
    adapt = normalised(TASKS, {"scene": 0.75, "mlm": 0.25})
    grads = {"a": jnp.asarray([[3.0, 4.0]]), "b": jnp.asarray([12.0])}
    scaled, told = adapt(grads, {task: None})
    assert told == {"share": share}
    np.testing.assert_allclose(scaled["b"], 12 / 13 * length, 1e-6)
    np.testing.assert_allclose(optax.global_norm(scaled), length, 1e-6)


def test_a_gradient_of_nothing_stays_nothing():
    scaled, _ = normalised(TASKS, {"scene": 1.0})({"a": jnp.zeros(3)}, {"scene": None})
    np.testing.assert_array_equal(scaled["a"], 0)


def test_with_share_one_it_is_adam():
    ours, theirs = scale_by_shared_adam(0.9, 0.99, 1e-8), optax.scale_by_adam(0.9, 0.99, 1e-8)
    states = ours.init(steps(1)[0]), theirs.init(steps(1)[0])
    for grads in steps(5):
        mine, state = ours.update(grads, states[0])
        wanted, other = theirs.update(grads, states[1])
        states = state, other
        np.testing.assert_allclose(mine["a"], wanted["a"], 1e-5, 1e-7)


def test_shares_divide_what_enters_the_moments():
    ours = scale_by_shared_adam(0.9, 0.99, 1e-8)
    chain = optax.chain(optax.clip_by_global_norm(100.0), ours, optax.scale(-0.1))
    state = chain.init(steps(1)[0])
    mean = square = 0.0
    for number, (grads, share) in enumerate(zip(steps(4), (0.5, 0.25, 0.5, 0.1), strict=True), 1):
        updates, state = jax.jit(chain.update, static_argnames="share")(grads, state, share=share)
        g = np.asarray(grads["a"], np.float64)
        mean = 0.9 * mean + 0.1 * g / share
        square = 0.99 * square + 0.01 * g * g / share
        wanted = (mean / (1 - 0.9**number)) / (np.sqrt(square / (1 - 0.99**number)) + 1e-8)
        np.testing.assert_allclose(updates["a"], -0.1 * wanted, 1e-4, 1e-6)
