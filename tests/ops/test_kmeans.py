"""k-means, plane and spherical: against all partitions, and clusters that were put there."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.ops.kmeans import kmeans, spherical_kmeans


def unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clusters", [2, 3])
def test_no_partition_is_better(clusters: int, seed: int) -> None:
    """Of each of all partitions the best centres are the directions of its sums."""
    x_ND = unit(np.random.default_rng(seed).normal(size=(8, 3)))
    best = max(
        sum(np.linalg.norm(x_ND[np.array(own) == e].sum(0)) for e in range(clusters)) / 8
        for own in product(range(clusters), repeat=8)
        if len(set(own)) == clusters
    )
    found = spherical_kmeans(3.0 * x_ND, clusters, np.random.default_rng(7))
    cosine = 1.0 - found.far / 8
    assert cosine <= best + 1e-12
    assert cosine >= best - 0.02  # of a few beginnings: seldom a little less
    np.testing.assert_allclose(np.linalg.norm(found.centres_ED, axis=1), 1.0)
    nearest_N = (x_ND @ found.centres_ED.T).argmax(1)
    np.testing.assert_array_equal(found.cluster_N, nearest_N)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("clusters", [2, 3])
def test_no_partition_lies_closer_together(clusters: int, seed: int) -> None:
    """Of each of all partitions the best centres are the means."""
    x_ND = np.random.default_rng(seed).normal(size=(8, 3))
    best = min(
        sum(x_ND[np.array(own) == e].var(0).sum() * own.count(e) for e in range(clusters))
        for own in product(range(clusters), repeat=8)
        if len(set(own)) == clusters
    )
    found = kmeans(x_ND, clusters, np.random.default_rng(7))
    assert best - 1e-12 <= found.far <= 1.05 * best  # of ten beginnings: seldom a little more
    for e, centre_D in enumerate(found.centres_ED):
        np.testing.assert_allclose(centre_D, x_ND[found.cluster_N == e].mean(0))
    square_NE = ((x_ND[:, None] - found.centres_ED) ** 2).sum(-1)
    np.testing.assert_array_equal(found.cluster_N, square_NE.argmin(1))


def test_clusters_that_were_put_there_are_found() -> None:
    rng = np.random.default_rng(0)
    true_ED = np.eye(6)[:5]
    own_N = rng.integers(5, size=400)
    scale_N1 = rng.uniform(0.1, 10.0, size=(400, 1))  # lengths must not matter
    x_ND = scale_N1 * (true_ED[own_N] + 0.05 * rng.normal(size=(400, 6)))
    found = spherical_kmeans(x_ND, 5, np.random.default_rng(1))
    table = np.zeros((5, 5), int)
    np.add.at(table, (own_N, found.cluster_N), 1)
    assert (np.count_nonzero(table, axis=0) == 1).all()
    assert (np.count_nonzero(table, axis=1) == 1).all()
    for e, centre_D in enumerate(found.centres_ED):
        assert centre_D @ true_ED[table[:, e].argmax()] > 0.99


def test_the_seed_decides() -> None:
    x_ND = np.random.default_rng(0).normal(size=(100, 4))
    one, two = (spherical_kmeans(x_ND, 8, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(one.centres_ED, two.centres_ED)
    other = spherical_kmeans(x_ND, 8, np.random.default_rng(4))
    assert np.abs(other.centres_ED - one.centres_ED).max() > 1e-3


def test_no_cluster_is_empty_and_too_few_directions_are_refused() -> None:
    few_ND = np.repeat(np.eye(3), 20, axis=0)
    found = spherical_kmeans(
        np.concatenate([few_ND, np.zeros((2, 3))]), 3, np.random.default_rng(0)
    )
    assert sorted(np.bincount(found.cluster_N)) == [20, 20, 20]
    with pytest.raises(UserError, match="3 tokens of different directions make no 4 clusters"):
        spherical_kmeans(few_ND, 4, np.random.default_rng(0))


def test_more_clusters_than_different_members_are_refused() -> None:
    with pytest.raises(UserError, match="2 different members make no 3 clusters"):
        kmeans(np.array([[0.0], [1.0], [1.0]]), 3, np.random.default_rng(0))
    found = kmeans(np.array([[0.0], [1.0], [1.0]]), 2, np.random.default_rng(0))
    assert sorted(np.bincount(found.cluster_N)) == [1, 2]
