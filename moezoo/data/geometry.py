"""Random scale and random window, the two augmentations of the dense benchmarks that change sizes.

InvPT, TaskPrompter and their successors scale, crop, flip and distort colours, in this order.
"""

from __future__ import annotations

import numpy as np

from moezoo.data import resample
from moezoo.data.padding import UNLABELLED
from moezoo.data.resample import WHOLE, Box, Size
from moezoo.data.source import IMAGE_TASKS, MAPS, Example

REDRAWS = 10
MOST = 0.75  # a window in which one class covers at least this share is drawn again


def scale(example: Example, rng: np.random.Generator) -> Example:
    """Enlarge or shrink by a factor drawn from [0.5, 2); see `scaled`."""
    return scaled(example, _factor(rng))


def crop(example: Example, rng: np.random.Generator, size: Size) -> Example:
    """A random window of at most `size`; see `draw_box`."""
    shape = example["image"].shape
    return window(example, draw_box((shape[0], shape[1]), example.get("semseg"), rng, size))


def scale_and_crop(example: Example, rng: np.random.Generator, size: Size) -> Example:
    """Exactly `scale`, then `crop`; pixels outside the window are never computed."""
    factor = _factor(rng)
    whole = _new_size(example, factor)
    semseg = resample.nearest(example["semseg"], whole) if "semseg" in example else None
    return scaled(example, factor, draw_box(whole, semseg, rng, size))


def _factor(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.5, 2.0))


def _new_size(example: Example, factor: float) -> Size:
    height, width = example["image"].shape[:2]
    return max(int(height * factor), 1), max(int(width * factor), 1)


def scaled(example: Example, factor: float, box: Box = WHOLE) -> Example:
    """Image bilinear, labels (normals too) at their nearest pixels, depth divided by the factor.

    Dividing depth keeps the focal length. Sides are rounded down; `box` is a window of the result.
    """
    size = _new_size(example, factor)
    result = {
        k: resample.nearest(v, size, box) if k in IMAGE_TASKS else v for k, v in example.items()
    }
    image = resample.linear(example["image"], size, box)
    result["image"] = np.rint(image, out=image).astype(np.uint8)
    if "depth" in example:
        result["depth"] = result["depth"] / np.float32(factor)
    if "intrinsics" in example:
        fx, fy, cx, cy = example["intrinsics"]
        centre = ((c + 0.5) * factor - 0.5 for c in (cx, cy))
        result["intrinsics"] = _moved(np.array([fx, fy, *centre], np.float32), box)
    return result


def draw_box(
    shape: Size, semseg_HW: np.ndarray | None, rng: np.random.Generator, size: Size
) -> Box:
    """A random window of at most `size`, drawn anew up to ten times while its classes are dull.

    Dull: a single class, or one that covers 75 % of the labelled pixels. A side that is shorter
    than the window's stays whole.
    """
    for _ in range(1 + REDRAWS):
        top, left = (
            int(rng.integers(0, max(n - m, 0) + 1)) for n, m in zip(shape, size, strict=True)
        )
        box = (slice(top, min(top + size[0], shape[0])), slice(left, min(left + size[1], shape[1])))
        if semseg_HW is None or varied(semseg_HW[box]):
            break
    return box


def varied(semseg_HW: np.ndarray) -> bool:
    """More than one class, none of which covers 75 % of the labelled pixels."""
    counts = np.bincount(semseg_HW.ravel(), minlength=256)[:UNLABELLED]
    several = int(np.count_nonzero(counts)) > 1
    return several and int(counts.max()) < MOST * int(counts.sum())


def window(example: Example, box: Box) -> Example:
    """The same part of every map."""
    result = {k: v[box] if k in MAPS else v for k, v in example.items()}
    if "intrinsics" in example:
        result["intrinsics"] = _moved(example["intrinsics"], box)
    return result


def _moved(intrinsics: np.ndarray, box: Box) -> np.ndarray:
    fx, fy, cx, cy = intrinsics
    top, left = (part.start or 0 for part in box)
    return np.array([fx, fy, cx - left, cy - top], np.float32)
