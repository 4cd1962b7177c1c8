"""The matching is valid and as large as SciPy's, on random graphs and on images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial.distance import cdist

from moezoo.domains.images.tasks.edges.matching import (
    matched_pixels,
    maximum_matching,
    offsets_within,
)


@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.floats(0.01, 0.4))
def test_maximum_on_random_graphs(seed: int, left: int, right: int, density: float) -> None:
    links = np.random.default_rng(seed).random((left, right)) < density
    rows, columns = np.nonzero(links)
    partner = maximum_matching(rows, columns + left, np.full(left + right, -1))
    taken = np.flatnonzero(partner[:left] >= 0)
    np.testing.assert_array_equal(partner[partner[taken]], taken)
    assert links[taken, partner[taken] - left].all()
    best = maximum_bipartite_matching(csr_matrix(links), perm_type="column")
    assert len(taken) == (best >= 0).sum()


def test_a_start_that_must_be_changed() -> None:
    # The only pair taken at the start blocks both others until the path is swapped.
    rows, columns = np.array([0, 1, 1, 2]), np.array([3, 3, 4, 4])
    start = np.array([-1, 3, -1, 1, -1])
    np.testing.assert_array_equal(np.sort(maximum_matching(rows, columns, start) >= 0)[1:], True)


@pytest.mark.parametrize("radius", [0.7, 1.0, 1.5, 2.9])
def test_counts_on_images(radius: float) -> None:
    rng = np.random.default_rng(int(10 * radius))
    truth = rng.random((18, 22)) < 0.08
    predicted = rng.random((4, 18, 22)) < np.array([0.0, 0.03, 0.1, 0.3])[:, None, None]
    counts = matched_pixels(predicted, truth, radius)
    for count, image in zip(counts, predicted, strict=True):
        if not image.any():
            assert count == 0
            continue
        near = cdist(np.argwhere(image), np.argwhere(truth)) <= radius
        assert count == (maximum_bipartite_matching(csr_matrix(near)) >= 0).sum()


def test_every_true_pixel_is_used_once() -> None:
    truth = np.zeros((5, 5), bool)
    truth[2, 2] = True
    assert matched_pixels(np.ones((1, 5, 5), bool), truth, 2.0).tolist() == [1]
    assert matched_pixels(np.ones((1, 5, 5), bool), np.zeros((5, 5), bool), 2.0).tolist() == [0]


def test_offsets_are_a_disc_with_the_nearest_first() -> None:
    steps = offsets_within(2.0)
    assert len(steps) == 13 and steps[0].tolist() == [0, 0]
    assert (np.diff((steps**2).sum(1)) >= 0).all()
