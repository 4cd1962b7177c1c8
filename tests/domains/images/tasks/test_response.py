"""Blur, orientation and suppression on images whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import convolve1d, gaussian_filter

from moezoo.domains.images.tasks.edges import response


@pytest.mark.parametrize("shape", [(20, 31), (2, 17, 12)])
def test_triangle_blur_is_a_convolution(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).random(shape, dtype=np.float32)
    kernel = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    expected = image.astype(np.float64)
    for axis in (-1, -2):
        expected = convolve1d(expected, kernel, axis=axis, mode="reflect")
    np.testing.assert_allclose(response.triangle_blur(image), expected, atol=2e-5)


@pytest.mark.parametrize("degrees", [0, 30, 45, 60, 89, 120, 135])
def test_orientation_points_across_a_line(degrees: int) -> None:
    y, x = np.mgrid[-30:31, -30:31].astype(np.float32)
    across = np.radians(degrees)
    distance = x * np.cos(across) + y * np.sin(across)
    line = np.exp(-(distance**2) / 8).astype(np.float32)
    found = response.orientation(line)[30, 30]
    apart = np.abs(np.angle(np.exp(2j * (found - across)))) / 2
    # The benchmark's formula takes the tangent's square: exact at 0, 45 and 90 degrees only.
    assert apart < np.radians(1 if degrees % 45 in (0, 44) else 11)


def test_suppression_leaves_the_ridge() -> None:
    line = np.zeros((40, 40), np.float32)
    line[:, 20] = 1
    soft = gaussian_filter(line, 1.5).astype(np.float32)
    kept = response.suppress(soft, response.orientation(soft))
    np.testing.assert_array_equal(np.nonzero(kept[20])[0], [20])
    np.testing.assert_allclose(kept[:, 20], soft[:, 20])


def test_borders_fade_from_zero() -> None:
    faded = response.fade_borders(np.ones((30, 20), np.float32), 5)
    np.testing.assert_allclose(faded[15, :6], [0, 0.2, 0.4, 0.6, 0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(faded[-1], 0)
    np.testing.assert_allclose(faded[1, 1], 0.04, rtol=1e-6)
    np.testing.assert_array_equal(response.fade_borders(np.ones((3, 3)), 0), np.ones((3, 3)))


def test_a_stack_equals_its_images_one_by_one() -> None:
    stack = np.random.default_rng(1).random((3, 24, 25), dtype=np.float32)
    together = response.thin_responses(stack, 5)
    for one, image in zip(together, stack, strict=True):
        np.testing.assert_array_equal(one, response.thin_responses(image, 5))
