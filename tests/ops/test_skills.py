"""Shares of skills beyond the published numbers: noise, one head, rows that choose nobody."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

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


@given(
    st.integers(1, 4), st.integers(2, 3), st.integers(1, 3), st.integers(1, 4), st.integers(0, 9)
)
def test_heads_equal_a_pair_of_mixed_factors_for_every_token(
    heads: int, count: int, rank: int, tokens: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    shapes = ((tokens, 2 * heads), (2 * heads, count * rank), (count * rank, 3 * heads))
    shapes += ((tokens, heads * count),)
    arrays = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    def by_token(x_ND, a_DR, b_RO, gates_NG):
        rows = []
        for x_D, gates_G in zip(x_ND, gates_NG, strict=True):
            a, b = skills.mixed_factors(a_DR, b_RO, gates_G.reshape(heads, count))
            rows.append(x_D @ a @ b)
        return jnp.stack(rows)

    wanted, slow = jax.vjp(by_token, *arrays)
    got, fast = jax.vjp(partial(skills.by_head, heads=heads), *arrays)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
    back = jnp.asarray(rng.normal(size=wanted.shape), jnp.float32)
    for found, right in zip(fast(back), slow(back), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-5)
