"""Examples of any size in a batch of one size: padding, and marking pixels without a label."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moezoo.data.source import SourceExample
from moezoo.errors import UserError
from moezoo.label import LabelKind

UNLABELLED = 255
MEAN_COLOUR = 0.0  # of normalised images

Size = tuple[int, int]


def pad(values: np.ndarray, size: Size, fill: float) -> np.ndarray:
    """A map [H,W,...] centred in one of `size`; an odd pixel goes below and to the right.

    Raises UserError for a map that is larger.
    """
    height, width = values.shape[:2]
    if (height, width) == size:
        return values
    if height > size[0] or width > size[1]:
        raise UserError(
            f"An image of {height} x {width} does not fit data.resolution {size[0]} x {size[1]}: "
            "set data.resolution to at least that, or add 'crop' to data.augment."
        )
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    padded = np.full((*size, *values.shape[2:]), fill, values.dtype)
    padded[top : top + height, left : left + width] = values
    return padded


def pad_label(kind: LabelKind, values: np.ndarray, size: Size) -> np.ndarray:
    """A label map with unlabelled pixels around it; other labels as they are."""
    return pad(values, size, kind.unknown) if kind.per_pixel else values


def without_foreground(label_HW: np.ndarray) -> np.ndarray:
    """A class map of nothing but background as entirely unlabelled; others as they are.

    For human parts: there are no people, or nobody's parts were annotated.
    """
    if ((label_HW == 0) | (label_HW == UNLABELLED)).all():
        return np.full_like(label_HW, UNLABELLED)
    return label_HW


def reference_marks(example: Mapping[str, np.ndarray], depth: float = -1.0) -> SourceExample:
    """The marks of TaskPrompter's `AddIgnoreRegions` (InvPT: depth=255), for comparisons with it.

    Normals of length 0 become 255, depth 0 becomes `depth`, parts without foreground 255. This
    project's own losses ignore normals and depths of 0 as they are.
    """
    marked = dict(example)
    if "normals" in marked:
        unknown = ~np.any(marked["normals"], axis=-1, keepdims=True)
        marked["normals"] = np.where(unknown, np.float32(UNLABELLED), marked["normals"])
    if "parts" in marked:
        marked["parts"] = without_foreground(marked["parts"])
    if "depth" in marked:
        marked["depth"] = np.where(marked["depth"] == 0, np.float32(depth), marked["depth"])
    return marked
