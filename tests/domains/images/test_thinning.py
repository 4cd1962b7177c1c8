"""Thinning keeps the pieces of an image, makes lines, and stops changing."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, label

from moezoo.domains.images.thinning import thin

EIGHT = np.ones((3, 3))


def blobs(seed: int, shape: tuple[int, ...] = (40, 50)) -> np.ndarray:
    return gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3) > 0.02


@given(st.integers(0, 500))
def test_topology_is_kept(seed: int) -> None:
    before = np.pad(blobs(seed), 1)
    after = thin(before)
    assert not (after & ~before).any()
    for image, structure in ((True, EIGHT), (False, None)):
        assert label(before == image, structure)[1] == label(after == image, structure)[1]


@given(st.integers(0, 500))
def test_thinning_twice_changes_nothing(seed: int) -> None:
    once = thin(blobs(seed))
    np.testing.assert_array_equal(thin(once), once)


def test_no_solid_block_is_left() -> None:
    lines = thin(blobs(7))
    blocks = sum(lines[i : 38 + i, j : 48 + j].astype(int) for i in range(3) for j in range(3))
    assert blocks.max() < 9


def test_a_bar_becomes_its_axis() -> None:
    bar = np.zeros((9, 30), bool)
    bar[3:6, 4:26] = True
    lines = thin(bar)
    np.testing.assert_array_equal(np.nonzero(lines.any(1))[0], [4])
    assert 18 <= lines.sum() <= 22


def test_thin_lines_and_points_stay() -> None:
    lines = np.zeros((12, 12), bool)
    lines[2], lines[5, 5] = True, True
    lines[np.arange(6, 11), np.arange(6, 11)] = True
    np.testing.assert_array_equal(thin(lines), lines)


def test_a_stack_equals_its_images_one_by_one() -> None:
    stack = np.stack([blobs(seed) for seed in range(4)])
    for one, image in zip(thin(stack), stack, strict=True):
        np.testing.assert_array_equal(one, thin(image))


def test_nothing_stays_nothing() -> None:
    assert not thin(np.zeros((3, 5, 5), bool)).any()
