"""Thinning keeps lines and makes them one pixel wide."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import label

from moezoo.domains.images.data.rooms.thin import thin

EIGHT = np.ones((3, 3))


def test_a_bar_becomes_a_line() -> None:
    mask = np.zeros((12, 20), bool)
    mask[4:8, 2:18] = True
    line = thin(mask)
    assert (line.sum(0)[5:15] == 1).all()
    assert not (line & ~mask).any()


def test_lines_stay_and_pieces_stay_connected() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.zeros((30, 30), bool)
        for _ in range(4):
            r, c = rng.integers(2, 26, 2)
            mask[r : r + 3, :c] = True
            mask[:r, c : c + 2] = True
        thinned = thin(mask)
        assert label(mask, EIGHT)[1] == label(thinned, EIGHT)[1]
        assert (thin(thinned) == thinned).all()


def test_one_pixel_lines_and_empty_masks_do_not_change() -> None:
    mask = np.zeros((9, 9), bool)
    assert not thin(mask).any()
    mask[4, 1:8] = True
    np.testing.assert_array_equal(thin(mask), mask)
    diagonal = np.eye(9, dtype=bool)
    np.testing.assert_array_equal(thin(diagonal), diagonal)
