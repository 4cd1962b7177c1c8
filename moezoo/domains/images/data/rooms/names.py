"""Names and colours of the semantic classes, object parts and kinds of scene."""

from __future__ import annotations

import numpy as np

CLASSES = (
    "wall",
    "floor",
    "ceiling",
    "window",
    "door",
    "picture",
    "rug",
    "bed",
    "table",
    "chair",
    "sofa",
    "cabinet",
    "plant",
    "object",
)

PARTS = (
    "background",
    "leg",
    "seat",
    "back",
    "arm",
    "top",
    "mattress",
    "pillow",
    "body",
    "front",
    "board",
    "shade",
    "pole",
    "pot",
    "leaves",
    "panel",
    "frame",
)

SCENES = ("bedroom", "living room", "office", "dining room", "playroom")

# What captions call furniture, small objects, windows and doors.
NOUNS = (
    "armchair",
    "ball",
    "bed",
    "bookshelf",
    "bowl",
    "box",
    "boxes",
    "cabinet",
    "ceiling lamp",
    "chair",
    "coffee table",
    "desk",
    "door",
    "double bed",
    "floor lamp",
    "kitchen counter",
    "monitor",
    "nightstand",
    "picture",
    "plant",
    "pot",
    "rug",
    "sofa",
    "stack of books",
    "table",
    "table lamp",
    "television",
    "vase",
    "wardrobe",
    "window",
)

CLASS = {name: index for index, name in enumerate(CLASSES)}
# Kinds of thing that a handful of pixels cannot tell apart share a class, as in NYU-13.
CLASS |= {"shelf": CLASS["cabinet"], "lamp": CLASS["object"], "screen": CLASS["object"]}
PART = {name: index for index, name in enumerate(PARTS)}
STRUCTURE = tuple(CLASS[n] for n in ("wall", "floor", "ceiling"))
FIXTURES = tuple(CLASS[n] for n in ("window", "door", "rug"))


def _palette(count: int, saturation: float) -> np.ndarray:
    """Distinct colours [count,3] uint8: hues by the golden angle, two brightness levels."""
    hue = (np.arange(count) * 0.61803398875) % 1.0
    value = np.where(np.arange(count) % 2 == 0, 0.95, 0.65)
    channels = np.abs((hue[:, None] * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    rgb = value[:, None] * (1 - saturation * (1 - np.clip(channels, 0, 1)))
    return np.round(255 * rgb).astype(np.uint8)


CLASS_PALETTE = _palette(len(CLASSES), 0.62)
PART_PALETTE = _palette(len(PARTS), 0.75)
PART_PALETTE[0] = 0
