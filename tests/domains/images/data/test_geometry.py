"""Random scale, random window and padding keep images and labels together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.data.source import SourceExample
from moezoo.domains.images.data import geometry, padding, resample, transforms
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.errors import UserError


def example(height: int = 30, width: int = 40, seed: int = 0) -> SourceExample:
    """Labels that tell their own place: red and depth grow to the right, green downwards."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    image = np.stack([columns * 5, rows * 5, np.zeros_like(rows)], -1).astype(np.uint8)
    normals = rng.normal(size=(height, width, 3)).astype(np.float32)
    return {
        "image": image,
        "semseg": rng.integers(0, 4, (height, width)).astype(np.uint8),
        "edge": (columns % 7 == 0).astype(np.uint8),
        "depth": (1 + columns).astype(np.float32),
        "normals": normals / np.linalg.norm(normals, axis=-1, keepdims=True),
        "intrinsics": np.array([50, 50, (width - 1) / 2, (height - 1) / 2], np.float32),
        "scene": np.uint8(3),
    }


def equal(a: SourceExample, b: SourceExample) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


@given(
    height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(8, 50), st.integers(8, 50)),
)  # fmt: skip
def test_in_one_step_as_in_two(height: int, width: int, seed: int, size: tuple) -> None:
    before = example(height, width)
    copies = {k: np.array(v) for k, v in before.items()}
    rng = np.random.default_rng(seed)
    two = geometry.crop(geometry.scale(before, rng, KINDS), rng, size, KINDS)
    one = geometry.scale_and_crop(before, np.random.default_rng(seed), size, KINDS)
    assert equal(one, two) and equal(before, copies)
    for name in geometry.maps_of(before, KINDS):
        if name in one:
            assert one[name].shape[:2] == one["image"].shape[:2]
            assert one[name].shape[0] <= size[0] and one[name].shape[1] <= size[1]


def test_a_sequence_takes_both_in_one_step() -> None:
    size = (20, 24)
    fused = transforms.sequence(("flip", "scale", "crop", "distort"), size, KINDS)
    apart = [transforms.named(name, size, KINDS) for name in ("flip", "scale", "crop", "distort")]
    assert len(fused) == 3 and len(transforms.sequence(("crop", "scale", "crop"), size, KINDS)) == 2
    for seed in range(8):
        one, two = example(), example()
        first, second = np.random.default_rng(seed), np.random.default_rng(seed)
        for transform in fused:
            one = transform(one, first)
        for transform in apart:
            two = transform(two, second)
        assert equal(one, two)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.7, 1.99])
def test_scaled_labels_lie_on_their_pixels(factor: float) -> None:
    before = example()
    after = geometry.scaled(before, factor, KINDS)
    assert after["image"].shape[:2] == (int(30 * factor), int(40 * factor))
    column = after["depth"] * factor - 1  # of the original
    off = np.abs(after["image"][..., 0] / 5.0 - column)
    assert off.max() <= 1.1  # OpenCV's nearest pixel is up to a pixel off
    assert set(np.unique(after["semseg"])) <= set(range(4)) and set(np.unique(after["edge"])) <= {
        0,
        1,
    }
    np.testing.assert_allclose(np.linalg.norm(after["normals"], axis=-1), 1, rtol=1e-5)
    fx, _, cx, cy = after["intrinsics"]
    assert (
        fx == 50
        and cx == pytest.approx(20 * factor - 0.5)
        and cy == pytest.approx(15 * factor - 0.5)
    )
    if factor == 1.0:
        assert equal(after, before)


def test_scales_cover_a_half_to_two() -> None:
    sides = [
        geometry.scale(example(), np.random.default_rng(k), KINDS)["depth"].shape[1]
        for k in range(99)
    ]
    assert min(sides) in range(20, 24) and max(sides) in range(76, 80)
    assert np.mean(sides) == pytest.approx(50, abs=4)


def test_a_window_is_a_part_of_the_example() -> None:
    before = example()
    for seed in range(20):
        after = geometry.crop(before, np.random.default_rng(seed), (12, 100), KINDS)
        assert after["image"].shape == (12, 40, 3)
        top = int(after["image"][0, 0, 1]) // 5
        for name in ("image", *geometry.maps_of(before, KINDS)):
            np.testing.assert_array_equal(after[name], before[name][top : top + 12])
        assert after["intrinsics"][3] == before["intrinsics"][3] - top and after["scene"] == 3


def test_windows_with_several_classes_are_preferred() -> None:
    """A tenth of the picture shows two classes; one draw would rarely hit it, eleven mostly do."""
    before = {"image": np.zeros((20, 400, 3), np.uint8), "semseg": np.zeros((20, 400), np.uint8)}
    before["semseg"][:, 195:205:2] = 1
    before["semseg"][:, :150] = 255
    found = [
        geometry.varied(geometry.crop(before, np.random.default_rng(k), (20, 10), KINDS)["semseg"])
        for k in range(200)
    ]
    once = [geometry.varied(before["semseg"][:, k : k + 10]) for k in range(391)]
    assert 0.0 < np.mean(once) < 0.06
    assert 0.2 < np.mean(found) < 0.6  # 1 - (1 - share)^11


@pytest.mark.parametrize(
    ("classes", "wanted"),
    [
        ([0, 0, 0, 0], False), ([0, 0, 0, 1], False), ([0, 0, 1, 1], True), ([255] * 4, False),
        ([255, 255, 255, 1], False), ([255, 255, 0, 1], True), ([0, 1, 2, 255], True),
    ],
)  # fmt: skip
def test_what_counts_as_varied(classes: list[int], wanted: bool) -> None:
    assert geometry.varied(np.array([classes], np.uint8)) == wanted


def test_padding_is_centred_and_unlabelled() -> None:
    before = example(5, 6)
    size = (8, 11)
    for name in ("semseg", "edge", "depth", "normals"):
        padded = padding.pad_label(KINDS[name], before[name], size)
        assert padded.shape[:2] == size and padded.dtype == before[name].dtype
        np.testing.assert_array_equal(padded[1:6, 2:8], before[name])
        around = np.ones(size, bool)
        around[1:6, 2:8] = False
        assert (padded[around] == (0 if name in ("depth", "normals") else 255)).all()
    whole = padding.pad_label(KINDS["semseg"], before["semseg"], (5, 6))
    assert whole is before["semseg"]
    with pytest.raises(UserError, match="5 x 6 does not fit data.resolution 4 x 9"):
        padding.pad(before["image"], (4, 9), 0)


def test_marks_change_nothing_else() -> None:
    before = example(4, 4) | {"parts": np.array([[0, 0, 0, 2]] * 4, np.uint8)}
    before["depth"][0] = before["normals"][1] = 0
    for mark in (-1.0, 255.0):
        after = padding.reference_marks(before, mark)
        assert (after["depth"][0] == mark).all() and (after["normals"][1] == 255).all()
        np.testing.assert_array_equal(after["depth"][1:], before["depth"][1:])
        np.testing.assert_array_equal(after["normals"][2:], before["normals"][2:])
        for name in ("parts", "semseg", "edge", "image"):
            np.testing.assert_array_equal(after[name], before[name])
    assert before["depth"][0].max() == 0


def test_resampling_of_a_part_is_a_part_of_the_whole() -> None:
    before = example()
    box = (slice(4, 19), slice(7, 50))
    for method in (resample.nearest, resample.linear):
        whole = method(before["image"], (44, 71))
        np.testing.assert_array_equal(method(before["image"], (44, 71), box), whole[box])
