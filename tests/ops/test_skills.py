"""Shares of skills beyond the published numbers: noise, one head, rows that choose nobody."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.ops import lowrank, skills


def test_relaxed_samples_are_on_as_often_as_their_probability() -> None:
    logits_NE = jnp.broadcast_to(jnp.array([-1.0, 0.0, 2.0]), (4000, 3))
    noisy_NE = skills.logistic_noise(logits_NE, jax.random.key(0))
    assert np.isfinite(noisy_NE).all()
    np.testing.assert_allclose(
        (noisy_NE > 0).mean(0), jax.nn.sigmoid(jnp.array([-1.0, 0.0, 2.0])), atol=0.03
    )


def test_one_head_mixes_factors_as_a_bank_does() -> None:
    rng = np.random.default_rng(0)
    x, a, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((5, 4), (4, 6), (6, 8)))
    gates = jax.nn.softmax(jnp.asarray(rng.normal(size=(5, 3)), jnp.float32))
    got = skills.by_head(x, a, b, gates, heads=1)
    np.testing.assert_allclose(got, lowrank.by_factor(x, a, b, gates), rtol=1e-4, atol=1e-5)


def test_a_row_that_chooses_nobody_keeps_its_shares_and_a_gradient() -> None:
    logits_E = jnp.array([-1.0, -2.0])
    shares, back = jax.vjp(skills.rounded_share, logits_E)
    np.testing.assert_allclose(shares.sum(), 1.0, rtol=1e-6)
    gradient = back(jnp.array([1.0, 0.0]))[0]
    assert 0 < gradient[0] < 1
    assert gradient[1] < 0
