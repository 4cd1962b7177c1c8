"""Layers that a table of tasks mixes: folded exactly, unknown tasks, pace, noise, refusals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn.context import Context
from moezoo.nn.injection import Adapted
from moezoo.nn.layers import Linear
from moezoo.nn.skill_tables import SkillTableRouter, skill_mixture

X_ND = jax.random.normal(jax.random.key(1), (6, 4))


def layer(heads: int, **options: object) -> Adapted:
    rngs = nnx.Rngs(0)
    update = skill_mixture(4, 6, 2, tasks=3, skills=4, heads=heads, alpha=4.0, rngs=rngs, **options)
    update.up.set_value(jax.random.normal(jax.random.key(2), update.up.get_value().shape))
    kernel = update.router.kernel
    kernel.set_value(jax.random.normal(jax.random.key(3), kernel.get_value().shape))
    return Adapted(Linear(4, 6, rngs=rngs), update)


@pytest.mark.parametrize("heads", [1, 2])
def test_a_folded_layer_is_the_task_s(heads: int) -> None:
    made = layer(heads)
    outputs = [made(X_ND, Context(task)).y for task in (0, 2)]
    assert not np.allclose(*outputs)
    mixed = made(X_ND, Context(jnp.array([0, 0, 0, 2, 2, 2]))).y
    np.testing.assert_allclose(mixed[3:], outputs[1][3:], rtol=1e-4, atol=1e-5)
    folded = made.folded(2)
    np.testing.assert_allclose(folded(X_ND), outputs[1], rtol=1e-4, atol=1e-5)


def test_a_task_that_the_table_lacks_has_equal_shares() -> None:
    made = layer(2)
    gates_G = made.update.constant_gates(17)
    np.testing.assert_allclose(gates_G, 0.25, rtol=1e-6)


def test_pace_multiplies_logits_and_not_where_they_begin() -> None:
    slow, fast = (SkillTableRouter(3, 4, 1, pace=pace, rngs=nnx.Rngs(0)) for pace in (1.0, 100.0))
    np.testing.assert_allclose(slow.rows(Context(1)), fast.rows(Context(1)), rtol=1e-5)
    moved = fast.kernel.get_value() + 0.01
    fast.kernel.set_value(moved)
    np.testing.assert_allclose(fast.rows(Context(1)), slow.rows(Context(1)) + 1.0, rtol=1e-4)


def test_noise_is_training_s_alone() -> None:
    router = SkillTableRouter(3, 4, 1, noise="relaxed", rngs=nnx.Rngs(0))
    quiet = router.decide(Context(0)).weights_NK
    np.testing.assert_allclose(quiet, 0.25, atol=1e-3)
    noisy = router.decide(Context(0), jax.random.key(0)).weights_NK
    assert np.abs(noisy - quiet).max() > 0.01
    np.testing.assert_allclose(noisy.sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "3 heads do not divide a layer of 4 inputs and 6 outputs"),
        ({"skills": 1}, "1 skill leaves a table nothing to choose"),
        ({"shares": "sigmiod"}, "sigmoid"),
        ({"noise": "loud"}, "noise of a table"),
    ],
)
def test_what_cannot_be_is_refused(options: dict, message: str) -> None:
    own = {"tasks": 3, "skills": 4, "alpha": 1.0} | options
    with pytest.raises(UserError, match=message):
        skill_mixture(4, 6, 2, **own, rngs=nnx.Rngs(0))
