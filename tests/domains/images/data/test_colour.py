"""Photometric distortion: hue, saturation and value as their definitions say."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from moezoo.domains.images.data import colour

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (23, 31, 3)).astype(np.uint8)


def hsv_of(image: np.ndarray) -> np.ndarray:
    """Python's own conversion, in degrees/2 and 0..255."""
    flat = [colorsys.rgb_to_hsv(*(p / 255.0)) for p in image.reshape(-1, 3).astype(float)]
    return np.array(flat) * [180, 255, 255]


def test_hue_saturation_value() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, -1)
    for image in (IMAGE, grey):
        found = np.stack(colour.to_hsv(image), -1).reshape(-1, 3).astype(float)
        off = np.abs(found - hsv_of(image))
        off[:, 0] = np.minimum(off[:, 0], 180 - off[:, 0])
        assert off.max() <= 0.7  # rounding, and OpenCV's reciprocals of 12 bits
        assert found[:, 0].max() < 180


def test_there_and_back_again() -> None:
    again = colour.from_hsv(*colour.to_hsv(IMAGE))
    assert np.abs(again.astype(int) - IMAGE).max() <= 5  # 180 hues tell no smaller differences
    assert np.abs(again.astype(int) - IMAGE).mean() < 1
    grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, -1)
    np.testing.assert_array_equal(colour.from_hsv(*colour.to_hsv(grey)), grey)


def test_turning_the_hue_and_taking_colour_away() -> None:
    pure = np.array([[[255, 0, 0], [0, 200, 0], [9, 9, 9]]], np.uint8)
    turned = colour.recoloured(pure, hue=60)  # 120 degrees: red, green, blue, red
    np.testing.assert_array_equal(turned, [[[0, 255, 0], [0, 0, 200], [9, 9, 9]]])
    np.testing.assert_array_equal(colour.recoloured(pure, hue=-120), turned)
    greyed = colour.recoloured(IMAGE, saturation=0.0)
    np.testing.assert_array_equal(greyed, np.repeat(IMAGE.max(-1, keepdims=True), 3, -1))


def test_brightness_and_contrast_are_cut_off() -> None:
    np.testing.assert_array_equal(
        colour.linear(np.array([0, 100, 250], np.uint8), shift=30.9), [30, 130, 255]
    )
    np.testing.assert_array_equal(
        colour.linear(np.array([0, 101, 250], np.uint8), factor=1.5), [0, 151, 255]
    )
    np.testing.assert_array_equal(colour.linear(np.array([9], np.uint8), shift=-32.0), [0])


def test_distort_is_pure_and_covers_its_cases() -> None:
    before = {"image": IMAGE, "semseg": np.zeros((23, 31), np.uint8)}
    kept = IMAGE.copy()
    found = [colour.distort(before, np.random.default_rng(k))["image"] for k in range(200)]
    again = [colour.distort(before, np.random.default_rng(k))["image"] for k in range(200)]
    np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(IMAGE, kept)
    untouched = np.mean([np.array_equal(image, IMAGE) for image in found])
    assert untouched == pytest.approx(1 / 16, abs=0.05)
    assert np.mean([image.mean() for image in found]) == pytest.approx(IMAGE.mean(), abs=6)
    assert all(image.dtype == np.uint8 and image.shape == IMAGE.shape for image in found)
