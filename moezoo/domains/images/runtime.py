"""Photos as an exported model reads them: the reader of exports whose input is an `image`.

A copy is in such exports as `photo.py`. Needs NumPy, and Pillow if a file is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.data import picture
    from moezoo.deploy.runtime import forms
    from moezoo.deploy.runtime.drawing import resize
    from moezoo.deploy.runtime.forms import ExportError
else:
    import forms  # pyright: ignore[reportMissingImports]
    import picture  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]
    from drawing import resize  # pyright: ignore[reportMissingImports]
    from forms import ExportError  # pyright: ignore[reportMissingImports]

Steps = Sequence[Mapping[str, Any]]
STEPS = forms.sequence(
    sc.table(
        {
            "step": sc.one_of("resize"),
            "height": forms.SIDE,
            "width": forms.SIDE,
            "mode": sc.one_of("bilinear", "nearest"),
            "antialias": sc.one_of(True),  # there is no other way here
        },
        ("step", "height", "width", "mode"),
    ),
    forms.step("scale", factor=sc.number(1e-6, 1e6)),
    forms.step(
        "normalise",
        mean=sc.list_of(sc.number(-1e6, 1e6), 3, 3),
        std=sc.list_of(sc.number(1e-6, 1e6), 3, 3),
    ),
)


def fits(shape: Sequence[Any], steps: Steps, place: str) -> None:
    """Raise FormatFault if these steps do not make images [height, width, 3] of this shape."""
    forms.need(len(shape) == 3 and shape[2] == 3, f"{place} does not have 3 colours")
    made, size = [steps[0]["height"], steps[0]["width"]], list(shape[:2])
    forms.need(made == size, f"preprocess makes {made} of an input, the program reads {size}")


def read(path: str | Path, steps: Steps = ()) -> np.ndarray:
    """A picture file as uint8 RGB [height, width, 3], upright, by the rules of `picture`.

    steps: from the manifest; reading a photo uses none of them. Raises ExportError if the file is
    missing, damaged or not an image.
    """
    try:
        return picture.rgb(path)
    except picture.PictureError as error:
        raise ExportError(f"The image {path} cannot be read, it {error}.") from error


def backdrop(example: np.ndarray, prepared: np.ndarray) -> np.ndarray:
    """The photo itself, on which a label is drawn; a picture of its prediction has its size."""
    return example


def prepare(photos: Any, shape: Sequence[int], steps: Steps) -> np.ndarray:
    """Photos uint8 [B, height, width, 3] prepared by a manifest's `preprocess` steps, float32.

    Images float32 of `shape`, [H, W, 3], are used as they are. Raises ExportError for anything
    else.
    """
    images, size = np.asarray(photos), tuple(shape[:2])
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ExportError(f"Images must be [batch, height, width, 3], not {images.shape}.")
    if images.dtype == np.uint8:
        return np.stack([_prepared(image, steps) for image in images])
    if images.dtype != np.float32 or images.shape[1:3] != size:
        raise ExportError(
            f"Images must be uint8 of any size, or normalised float32 of {size[0]}x"
            f"{size[1]}; these are {images.dtype} of {images.shape[1]}x{images.shape[2]}."
        )
    return images


def _prepared(image: np.ndarray, steps: Steps) -> np.ndarray:
    value = image
    for step in steps:
        if step["step"] == "resize":
            value = resize(value, (step["height"], step["width"]), step["mode"])
        elif step["step"] == "scale":
            value = value.astype(np.float32) * np.float32(step["factor"])
        elif step["step"] == "normalise":
            mean, std = np.float32(step["mean"]), np.float32(step["std"])
            value = (value - mean) / std
        else:
            raise ExportError(f"The manifest asks for an unknown step '{step['step']}'.")
    return value
