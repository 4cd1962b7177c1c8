"""Ground-truth boundaries and the boundary F-measure of a whole image."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from moezoo.domains.images.tasks.edge import BoundaryF
from moezoo.domains.images.tasks.edges import boundaries, odsf

ROOMS = odsf.PROTOCOLS["rooms"]


def circle(shape: tuple[int, int] = (48, 64)) -> np.ndarray:
    """A region map with one disc."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return ((y - 24) ** 2 + (x - 30) ** 2 < 15**2).astype(np.uint8)


def as_bytes(chance: np.ndarray) -> np.ndarray:
    return np.floor(255 * np.clip(chance, 0, 1)).astype(np.uint8)


def scores(metric: BoundaryF, chance: np.ndarray, label: np.ndarray) -> dict[str, float]:
    return metric.compute(metric.count_bytes(as_bytes(chance)[None], label[None]))


def test_outline_looks_east_south_and_south_east() -> None:
    label = np.array([[0, 0, 0], [0, 1, 1], [0, 1, 2]])
    expected = [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    np.testing.assert_array_equal(boundaries.outlines(label), np.array(expected, bool))


def test_regions_of_one_label_that_touch_at_a_corner_are_two() -> None:
    label = np.array([[1, 0], [0, 1]])
    regions = boundaries.connected_regions(label)
    assert len(np.unique(regions)) == 4
    assert len(np.unique(boundaries.connected_regions(np.array([[1, 1], [0, 1]])))) == 2


def test_drawn_and_region_truth_agree_on_a_disc() -> None:
    line = boundaries.drawn(boundaries.outlines(circle()).astype(np.uint8))
    np.testing.assert_array_equal(line, boundaries.from_regions(circle()))
    assert 80 < line.sum() < 100


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_a_shifted_edge_matches_within_the_tolerance(shift: int) -> None:
    line = boundaries.from_regions(circle())
    soft = 4 * gaussian_filter(line.astype(np.float64), 1.0)
    found = scores(BoundaryF(ROOMS), np.roll(soft, shift, axis=1), line.astype(np.uint8))
    assert (found["odsF"] > 0.95) == (shift <= 1)
    assert found["oisF"] == found["odsF"]


def test_noise_beside_the_edge_costs_precision() -> None:
    line = boundaries.from_regions(circle())
    soft = 4 * gaussian_filter(line.astype(np.float64), 1.0)
    speckles = np.random.default_rng(0).random(line.shape) < 0.03
    clean = scores(BoundaryF(ROOMS), soft, line.astype(np.uint8))["odsF"]
    noisy = scores(BoundaryF(ROOMS), np.maximum(soft, speckles), line.astype(np.uint8))["odsF"]
    assert noisy < clean - 0.05


def test_padding_is_cut_away() -> None:
    label = boundaries.from_regions(circle()).astype(np.uint8)
    chance = 4 * gaussian_filter(label.astype(np.float64), 1.0)
    protocol = dataclasses.replace(odsf.PROTOCOLS["nyud"], thresholds=(0.2, 0.5))
    padded = np.pad(label, ((3, 5), (6, 2)), constant_values=255)
    wrong = np.pad(chance, ((3, 5), (6, 2)), constant_values=1.0)
    plain = odsf.count_image(chance, label, protocol)
    cut = odsf.count_image(wrong, padded, protocol)
    assert plain is not None and cut is not None
    for ours, other in zip(plain, cut, strict=True):
        np.testing.assert_array_equal(ours, other)


def test_images_without_labels_are_skipped_and_padded_rows_too() -> None:
    label = boundaries.from_regions(circle()).astype(np.uint8)
    batch = np.stack([label, np.full_like(label, 255), label])
    maps = np.stack([255 * label] * 3)
    metric = BoundaryF(ROOMS)
    once = metric.count_bytes(maps, batch, np.array([True, True, False]))
    alone = metric.count_bytes(maps[:1], batch[:1])
    for key, value in once.items():
        np.testing.assert_array_equal(value, alone[key])


def test_each_image_has_its_own_best_threshold() -> None:
    label = boundaries.from_regions(circle()).astype(np.uint8)
    soft = 4 * gaussian_filter(label.astype(np.float64), 1.0)
    rng = np.random.default_rng(1)
    floor = gaussian_filter(rng.random(label.shape), 0.7)
    strong, weak = np.maximum(soft, 0.6 * floor), 0.4 * np.maximum(soft, 0.1 * floor)
    metric = BoundaryF(ROOMS)
    maps = np.stack([as_bytes(strong), as_bytes(weak)])
    found = metric.compute(metric.count_bytes(maps, np.stack([label, label])))
    assert found["oisF"] >= found["odsF"]


def test_no_prediction_and_no_truth() -> None:
    label = boundaries.from_regions(circle()).astype(np.uint8)
    assert scores(BoundaryF(ROOMS), np.zeros(label.shape), label)["odsF"] == 0
    nothing = scores(BoundaryF(ROOMS), label.astype(np.float64), np.zeros_like(label))
    assert np.isnan(nothing["odsF"])
