"""Prototype routing where nothing resembles anything, and what is not in published numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.ops import prototypes

P_ED = jnp.eye(3, 4)


@pytest.mark.parametrize("name", prototypes.LIKENESSES)
def test_a_token_that_resembles_nothing_has_equal_scores(name: str) -> None:
    score = prototypes.PrototypeScore(prototypes.LIKENESSES[name])
    zero_ND = jnp.zeros((1, 4))
    logits_NE, back = jax.vjp(lambda x: score(x, P_ED), zero_ND)
    np.testing.assert_array_equal(logits_NE, jnp.broadcast_to(logits_NE[:, :1], (1, 3)))
    assert np.isfinite(back(jnp.ones((1, 3)))[0]).all()
    for share in (prototypes.boosted_softmax, prototypes.standardised_softmax):
        np.testing.assert_allclose(share(jnp.zeros((1, 3))), 1 / 3, rtol=1e-6)


def test_norms_leave_a_vector_of_zeros_finite() -> None:
    for norm in {**prototypes.INPUT_NORMS, **prototypes.PROTOTYPE_NORMS}.values():
        np.testing.assert_array_equal(norm(jnp.zeros((2, 4))), 0.0)


def test_the_largest_score_alone_is_boosted() -> None:
    scores_NE = jnp.array([[0.1, 0.5, 0.3]])
    wanted = jax.nn.softmax(jnp.array([[0.1, 2.0, 0.3]]))
    np.testing.assert_allclose(prototypes.boosted_softmax(scores_NE), wanted, rtol=1e-6)


def test_standardised_scores_do_not_depend_on_their_scale() -> None:
    scores_NE = jnp.array([[0.1, 0.5, 0.3]])
    got = prototypes.standardised_softmax(scores_NE)
    np.testing.assert_allclose(got, prototypes.standardised_softmax(7 * scores_NE + 2), rtol=1e-4)
    root = np.sqrt(1.5)
    np.testing.assert_allclose(got, jax.nn.softmax(jnp.array([[-root, root, 0.0]])), atol=1e-5)


def test_projected_gradients_keep_their_angles() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 50)).astype(np.float32)
    key = jax.random.key(0)
    first, second = (prototypes.projected(jnp.asarray(v), key, 4096) for v in (a, a + b))
    np.testing.assert_allclose(jnp.vdot(first, first), 1.0, rtol=1e-5)
    wanted = a @ (a + b) / np.linalg.norm(a) / np.linalg.norm(a + b)
    np.testing.assert_allclose(jnp.vdot(first, second), wanted, atol=0.05)
    np.testing.assert_array_equal(prototypes.projected(jnp.zeros(50), key, 8), 0.0)


def test_labelled_prototypes_speak_for_their_expert() -> None:
    scores = jnp.asarray([[1.0, 5.0, 2.0, 4.0], [0.0, -3.0, -1.0, -7.0]])
    label = jnp.asarray([0, 3, 0, 1])
    inf = np.inf
    mean = prototypes.labelled_mean(scores, label, 4)
    np.testing.assert_allclose(mean, [[1.5, 4, -inf, 5], [-0.5, -7, -inf, -3]])
    largest = prototypes.labelled_max(scores, label, 4)
    np.testing.assert_allclose(largest, [[2, 4, -inf, 5], [0, -7, -inf, -3]])
