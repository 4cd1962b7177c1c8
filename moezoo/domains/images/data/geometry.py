"""Random scale and random window, the two augmentations of the dense benchmarks that change sizes.

InvPT, TaskPrompter and their successors scale, crop, flip and distort colours, in this order.
"""

from __future__ import annotations

import numpy as np

from moezoo.data.source import Kinds, SourceExample
from moezoo.domains.images.data import resample
from moezoo.domains.images.data.padding import UNLABELLED
from moezoo.domains.images.data.resample import WHOLE, Box, Size
from moezoo.label import declared

REDRAWS = 10
MOST = 0.75  # a window in which one class covers at least this share is drawn again


def maps_of(example: SourceExample, kinds: Kinds) -> list[str]:
    """The labels of an example that are maps.

    Raises UserError for an array of the image's size whose kind is not declared: it would stay
    unchanged while its image moves.
    """
    size = example["image"].shape[:2]
    for name, value in example.items():
        if name != "image" and name not in kinds and np.shape(value)[:2] == size:
            declared(None, f"The label {name} of an example", f"give Info(kinds={{'{name}': ...}})")
    return [name for name in example if name in kinds and kinds[name].per_pixel]


def of_classes(example: SourceExample, kinds: Kinds) -> str | None:
    """The first declared map of classes that an example has."""
    return next((n for n, kind in kinds.items() if kind.form == "class" and n in example), None)


def scale(example: SourceExample, rng: np.random.Generator, kinds: Kinds) -> SourceExample:
    """Enlarge or shrink by a factor drawn from [0.5, 2); see `scaled`."""
    return scaled(example, _factor(rng), kinds)


def crop(
    example: SourceExample, rng: np.random.Generator, size: Size, kinds: Kinds
) -> SourceExample:
    """A random window of at most `size`; see `draw_box`."""
    shape, classes = example["image"].shape, of_classes(example, kinds)
    given = None if classes is None else example[classes]
    unknown = kinds[classes].unknown if classes else UNLABELLED
    return window(example, draw_box((shape[0], shape[1]), given, rng, size, unknown), kinds)


def scale_and_crop(
    example: SourceExample, rng: np.random.Generator, size: Size, kinds: Kinds
) -> SourceExample:
    """Exactly `scale`, then `crop`; pixels outside the window are never computed."""
    factor, classes = _factor(rng), of_classes(example, kinds)
    whole = _new_size(example, factor)
    given = None if classes is None else resample.nearest(example[classes], whole)
    unknown = kinds[classes].unknown if classes else UNLABELLED
    return scaled(example, factor, kinds, draw_box(whole, given, rng, size, unknown))


def _factor(rng: np.random.Generator) -> float:
    return float(rng.uniform(0.5, 2.0))


def _new_size(example: SourceExample, factor: float) -> Size:
    height, width = example["image"].shape[:2]
    return max(int(height * factor), 1), max(int(width * factor), 1)


def scaled(example: SourceExample, factor: float, kinds: Kinds, box: Box = WHOLE) -> SourceExample:
    """Image bilinear, labels (normals too) at their nearest pixels, depth divided by the factor.

    Dividing depth keeps the focal length. Sides are rounded down; `box` is a window of the result.
    """
    size, result = _new_size(example, factor), dict(example)
    for name in maps_of(example, kinds):
        result[name] = kinds[name].scaled(resample.nearest(example[name], size, box), factor)
    image = resample.linear(example["image"], size, box)
    result["image"] = np.rint(image, out=image).astype(np.uint8)
    if "intrinsics" in example:
        fx, fy, cx, cy = example["intrinsics"]
        centre = ((c + 0.5) * factor - 0.5 for c in (cx, cy))
        result["intrinsics"] = _moved(np.array([fx, fy, *centre], np.float32), box)
    return result


def draw_box(
    shape: Size,
    classes_HW: np.ndarray | None,
    rng: np.random.Generator,
    size: Size,
    unknown: float = UNLABELLED,
) -> Box:
    """A random window of at most `size`, drawn again up to ten times while its classes are dull.

    Dull: a single class, or one that covers 75 % of the labelled pixels. A side shorter than the
    window's stays whole.
    """
    for _ in range(1 + REDRAWS):
        top, left = (
            int(rng.integers(0, max(n - m, 0) + 1)) for n, m in zip(shape, size, strict=True)
        )
        box = (slice(top, min(top + size[0], shape[0])), slice(left, min(left + size[1], shape[1])))
        if classes_HW is None or varied(classes_HW[box], unknown):
            break
    return box


def varied(classes_HW: np.ndarray, unknown: float = UNLABELLED) -> bool:
    """More than one class, none of which covers 75 % of the labelled pixels."""
    counts = np.bincount(classes_HW[classes_HW != unknown], minlength=1)
    several = int(np.count_nonzero(counts)) > 1
    return several and int(counts.max()) < MOST * int(counts.sum())


def window(example: SourceExample, box: Box, kinds: Kinds) -> SourceExample:
    """The same part of every map."""
    moved = {name: example[name][box] for name in ("image", *maps_of(example, kinds))}
    result = {**example, **moved}
    if "intrinsics" in example:
        result["intrinsics"] = _moved(example["intrinsics"], box)
    return result


def _moved(intrinsics: np.ndarray, box: Box) -> np.ndarray:
    fx, fy, cx, cy = intrinsics
    top, left = (part.start or 0 for part in box)
    return np.array([fx, fy, cx - left, cy - top], np.float32)
