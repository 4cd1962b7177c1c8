"""Variations keep image and labels together."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.data.source import SourceExample
from moezoo.domains.images.data import transforms as tf
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.domains.images.data.rooms.render import View

SAME_SIZE = [name for name in tf.AUGMENTATIONS if name not in ("scale", "crop")]


def made(name: str) -> tf.Transform:
    return tf.named(name, (64, 64), KINDS)


def example(view: View) -> SourceExample:
    labels = view.labels
    return {
        "image": view.image_HW3,
        "semseg": labels.semseg_HW,
        "parts": labels.parts_HW,
        "edge": labels.edge_HW,
        "saliency": view.saliency_HW,
        "depth": labels.depth_HW,
        "normals": labels.normals_HW3,
        "intrinsics": view.intrinsics,
        "scene": np.int64(view.kind),
    }


def facing(e: SourceExample) -> np.ndarray:
    """Normal times viewing ray: negative wherever the surface faces the camera."""
    fx, fy, cx, cy = e["intrinsics"]
    rows, columns = np.indices(e["depth"].shape)
    ray = np.stack([(columns - cx) / fx, -(rows - cy) / fy, -np.ones_like(rows)], -1)
    return (ray * e["normals"]).sum(-1)


def test_mirror_is_its_own_inverse_and_keeps_the_geometry(views: list[View]) -> None:
    for view in views[:6]:
        before = example(view)
        after = tf.mirror(before, KINDS)
        np.testing.assert_array_equal(after["semseg"], before["semseg"][:, ::-1])
        np.testing.assert_array_equal(after["normals"][..., 0], -before["normals"][:, ::-1, 0])
        np.testing.assert_allclose(facing(after), facing(before)[:, ::-1], atol=1e-5)
        again = tf.mirror(after, KINDS)
        for name, value in before.items():
            np.testing.assert_array_equal(again[name], value)


@pytest.mark.parametrize("name", SAME_SIZE)
def test_augmentations_are_pure_and_keep_shapes(views: list[View], name: str) -> None:
    before = example(views[0])
    copies = {k: np.array(v) for k, v in before.items()}
    first = made(name)(before, np.random.default_rng(7))
    second = made(name)(before, np.random.default_rng(7))
    for key, value in copies.items():
        np.testing.assert_array_equal(before[key], value)
        np.testing.assert_array_equal(first[key], second[key])
        assert np.shape(first[key]) == value.shape and first[key].dtype == value.dtype


@pytest.mark.parametrize("name", SAME_SIZE)
def test_augmentations_vary(views: list[View], name: str) -> None:
    images = [
        made(name)(example(views[0]), np.random.default_rng(k))["image"].tobytes()
        for k in range(12)
    ]
    assert len(set(images)) >= 2


def test_photometric_changes_colours_only(views: list[View]) -> None:
    before = example(views[0])
    after = tf.photometric(before, np.random.default_rng(0))
    assert all(after[k] is before[k] for k in before if k != "image")
    assert np.abs(after["image"].astype(int) - before["image"]).mean() < 60


@pytest.mark.slow
def test_zoom_divides_depth_and_keeps_labels_on_their_pixels(views: list[View]) -> None:
    before = example(views[0])
    before["image"] = np.repeat(before["semseg"][..., None] * np.uint8(10), 3, -1)
    found = [tf.zoom(before, np.random.default_rng(seed), KINDS) for seed in range(12)]
    for after in found:
        assert (after["image"][..., 0] == after["semseg"] * 10).mean() > 0.6
        assert set(np.unique(after["semseg"])) <= set(np.unique(before["semseg"]))
        depths = [after["depth"].astype(float) * factor for factor in (1.0, 1.2, 1.5)]
        known = before["depth"].astype(float).ravel()
        assert any(np.abs(known - d.ravel()[:, None]).min(1).max() < 1e-5 for d in depths)
    assert {after is before for after in found} == {True, False}


def test_zoom_of_a_plane() -> None:
    flat = {
        "image": np.full((8, 8, 3), 90, np.uint8),
        "depth": np.full((8, 8), 3.0, np.float32),
    }
    found = {
        float(tf.zoom(flat, np.random.default_rng(k), KINDS)["depth"][0, 0]) for k in range(20)
    }
    assert sorted(found) == pytest.approx([2.0, 2.5, 3.0])
    assert (tf.zoom(flat, np.random.default_rng(1), KINDS)["image"] == 90).all()


def test_normalise_round_trip() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3)).astype(np.uint8)
    ready = tf.normalise(image)
    assert ready.dtype == np.float32
    np.testing.assert_allclose(ready[..., 0], (image[..., 0] / 255 - 0.485) / 0.229, rtol=1e-5)
    np.testing.assert_array_equal(tf.denormalise(ready), image)
