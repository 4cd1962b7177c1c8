"""Random disjoint parts of a matrix, and divergences of predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.ops import divergence, sparse_masks


@pytest.mark.parametrize("experts", [1, 3, 4])
def test_parts_are_disjoint_cover_everything_and_are_equal(experts: int) -> None:
    owner = sparse_masks.random_owners(jax.random.key(0), (5, 7), experts)
    masks = np.asarray(sparse_masks.masks(owner, experts))
    np.testing.assert_array_equal(masks.sum(0), 1)
    sizes = masks.reshape(experts, -1).sum(1)
    assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("entries", "sizes"),
    [(7, [3, 4]), (11, [3, 4, 4]), (15, [3, 4, 4, 4]), (18, [3, 3, 3, 3, 2, 4])],
)
def test_parts_end_where_the_published_code_ends_them(entries: int, sizes: list[int]) -> None:
    owner = sparse_masks.owners(jnp.arange(entries, dtype=jnp.float32), len(sizes))
    np.testing.assert_array_equal(owner, np.repeat(np.arange(len(sizes)), sizes))


def test_only_owned_entries_get_a_gradient_and_the_mean_is_the_merged_one() -> None:
    start, moved = jax.random.normal(jax.random.key(1), (2, 6, 4))
    owner = sparse_masks.random_owners(jax.random.key(2), (6, 4), 3)
    grad = jax.grad(lambda m: sparse_masks.part(start, m, owner, 1).sum())(moved)
    np.testing.assert_array_equal(grad, owner == 1)
    every = jnp.stack([sparse_masks.part(start, moved, owner, e) for e in range(3)])
    np.testing.assert_allclose(every.mean(0), sparse_masks.merged(start, moved, 1 / 3), rtol=1e-5)
    np.testing.assert_allclose(moved, sparse_masks.merged(start, moved, 1.0), rtol=1e-5)


@pytest.mark.parametrize(
    "kind", [divergence.categorical, divergence.bernoulli, divergence.gaussian]
)
def test_divergences(kind: divergence.Divergence) -> None:
    p, q = jax.random.normal(jax.random.key(3), (2, 5, 3))
    assert kind(p, q) > 0 and abs(kind(p, p)) < 1e-7
    same = divergence.symmetric(kind, p, q)
    np.testing.assert_allclose(same, divergence.symmetric(kind, q, p), rtol=1e-6)
    _, taught = jax.grad(lambda p, q: divergence.towards(kind, p, q), argnums=(0, 1))(p, q)
    np.testing.assert_array_equal(taught, 0)  # what is learned from learns nothing


def test_two_logits_are_one() -> None:
    p, q = jax.random.normal(jax.random.key(4), (2, 6))
    wide = [jnp.stack([jnp.zeros_like(x), x], -1) for x in (p, q)]
    found = divergence.categorical(*wide)
    np.testing.assert_allclose(found, divergence.bernoulli(p, q), rtol=1e-5)
