"""Random and perfect predictions for every task, with labels that have unlabelled pixels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moezoo.tasks.base import Task
from tests.tasks.tables import IMAGES, build

CLASSES = 5
SHAPE = (8, 24, 32)


class Sample(NamedTuple):
    """Raw network outputs and the label of one batch."""

    logits: np.ndarray
    label: np.ndarray


def tasks() -> dict[str, Task]:
    """Every task on images at a small size."""
    settings = {name: {"classes": CLASSES} for name in ("semseg", "parts", "scene")}
    return {name: build(name, **settings.get(name, {})) for name in IMAGES}


def labels(name: str, seed: int = 0) -> np.ndarray:
    """A label of the batch contract with a block of unlabelled pixels in every image.

    Where there is one label for the image, the last image has none.
    """
    rng = np.random.default_rng(seed)
    if name == "scene":
        return np.append(rng.integers(0, CLASSES, SHAPE[0] - 1), 255).astype(np.uint8)
    if name == "normals":
        vectors = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors[:, :4, :5] = 0
        return vectors
    if name == "depth":
        metres = rng.uniform(0.5, 9.0, SHAPE).astype(np.float32)
        metres[:, :4, :5] = 0
        return metres
    if name == "edge":
        label = rectangles(rng)
    elif name == "saliency":
        label = (rng.random(SHAPE) < 0.3).astype(np.uint8)
    else:
        label = rng.integers(0, CLASSES, SHAPE).astype(np.uint8)
    label[:, :4, :5] = 255
    return label


def rectangles(rng: np.random.Generator) -> np.ndarray:
    """Outlines of one rectangle per image, clear of the unlabelled block and of the border."""
    label = np.zeros(SHAPE, np.uint8)
    for image in label:
        top, left = rng.integers(6, 9, 2)
        bottom, right = top + rng.integers(7, 12), left + rng.integers(8, 18)
        image[top : bottom + 1, [left, right]] = 1
        image[[top, bottom], left : right + 1] = 1
    return label


def noise(name: str, channels: int, seed: int = 0) -> Sample:
    """Predictions that have nothing to do with the label."""
    rng = np.random.default_rng(seed + 1000)
    label = labels(name, seed)
    logits = rng.normal(size=(*label.shape[:3], channels)).astype(np.float32)
    return Sample(logits, label)


def perfect(name: str, seed: int = 0) -> Sample:
    """Predictions that agree with the label wherever there is one."""
    label = labels(name, seed)
    if name == "normals":
        return Sample(3.0 * label, label)
    if name == "depth":
        return Sample(label[..., None], label)
    if name in ("edge", "saliency"):
        return Sample(np.where(label == 1, 20.0, -20.0).astype(np.float32)[..., None], label)
    return Sample(20.0 * (label[..., None] == np.arange(CLASSES)).astype(np.float32), label)


def nothing(name: str) -> np.ndarray:
    """A label without a single labelled pixel."""
    label = labels(name)
    return np.zeros_like(label) if label.dtype == np.float32 else np.full_like(label, 255)
