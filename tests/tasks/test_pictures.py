"""Colours of pictures."""

from __future__ import annotations

import numpy as np

from moezoo.domains.images.tasks import depth, normals
from moezoo.tasks import painting


def test_palette_colours_are_distinct() -> None:
    for count, least in ((14, 80), (41, 40)):
        colours = painting.palette(count).astype(int)
        apart = np.abs(colours[:, None] - colours[None]).sum(-1)
        assert apart[~np.eye(count, dtype=bool)].min() >= least
        assert colours.sum(-1).min() >= least
    np.testing.assert_array_equal(painting.palette(7), painting.palette(40)[:7])


def test_unlabelled_is_black() -> None:
    picture = painting.classes(np.array([[0, 255]], np.uint8), painting.palette(3))
    np.testing.assert_array_equal(picture[0, 0], painting.palette(3)[0])
    np.testing.assert_array_equal(picture[0, 1], 0)


def test_depth_has_a_fixed_range() -> None:
    picture = depth.on_scale(np.array([[0.1, 5.0, 10.0, 30.0, 0.0, np.nan]]), near=0.0, far=10.0)
    brightness = picture[0].astype(int).sum(-1)
    assert brightness[0] > brightness[1] > brightness[2] == brightness[3] > 0
    assert brightness[4] == brightness[5] == 0


def test_normals_are_colours_of_the_unit_vector() -> None:
    vectors = np.array([[[0, 0, 2.0], [-1, 0, 0], [0, 0, 0]]])
    expected = [[[128, 128, 255], [0, 128, 128], [0, 0, 0]]]
    np.testing.assert_array_equal(normals.coloured(vectors), expected)


def test_grey_shows_unlabelled_apart() -> None:
    picture = painting.grey(np.array([[0, 1, 255]], np.uint8))
    np.testing.assert_array_equal(picture[0, :, 0], [0, 255, 128])
    np.testing.assert_array_equal(painting.grey(np.full((2, 2, 1), 0.5))[0, 0], 128)
