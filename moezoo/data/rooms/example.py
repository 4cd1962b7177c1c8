"""A rendered view as the record that is written: PNG pictures and plain arrays."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from moezoo.data.rooms.names import SCENES
from moezoo.data.rooms.render import View, render_example


def png(pixels: np.ndarray) -> bytes:
    """Lossless PNG bytes of uint8 pixels [H,W] or [H,W,3]."""
    out = BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=3)
    return out.getvalue()


def record(view: View) -> dict[str, Any]:
    """Features of one example: bytes for pictures and label maps, float32 arrays, text."""
    labels = view.labels
    return {
        "image": png(view.image_HW3),
        "semseg": png(labels.semseg_HW),
        "parts": png(labels.parts_HW),
        "edge": png(labels.edge_HW),
        "saliency": png(view.saliency_HW),
        "depth": labels.depth_HW,
        "normals": labels.normals_HW3,
        "intrinsics": view.intrinsics,
        "caption": view.caption,
        "scene": SCENES[view.kind],
    }


def render_record(seed: int, split: str, index: int, height: int, width: int) -> dict[str, Any]:
    """The record of (seed, split, index), the same in every process."""
    return record(render_example(seed, split, index, height, width))
