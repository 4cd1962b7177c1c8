"""Photos that an export reads and pictures that it writes, and the one error of all its files.

A copy travels in every export. Needs NumPy, and Pillow where a picture is touched.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo.data import picture
else:
    import picture  # pyright: ignore[reportMissingImports]


class ExportError(Exception):
    """An exported folder, or a file given to it, cannot be used: one sentence that says why."""


def read_image(path: str | Path) -> np.ndarray:
    """A picture file as uint8 RGB [height, width, 3], upright, by the rules of `picture`.

    Raises ExportError when the file is missing, damaged or not an image.
    """
    try:
        return picture.rgb(path)
    except picture.PictureError as error:
        raise ExportError(f"The image {path} cannot be read, it {error}.") from error


def resize(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resize [h, w] or [h, w, C] to `size` = (height, width); "bilinear" is antialiased."""
    if image.shape[:2] == tuple(size):
        return image
    from PIL import Image

    kind = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}[mode]
    if image.dtype == np.uint8 or image.ndim == 2:
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), kind))
    planes = [resize(image[..., c], size, mode) for c in range(image.shape[2])]
    return np.stack(planes, axis=-1)


def tagged(photo: np.ndarray, name: str, colour: list[int]) -> np.ndarray:
    """The photo, uint8 [height, width, 3], with a bar of `colour` and a name at its lower edge."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = photo.shape[:2]
    letters = max(8, min(height // 8, 3 * width // 2 // len(name)))
    draw = ImageDraw.Draw(made := Image.fromarray(photo))
    draw.rectangle((0, height - 3 * letters // 2, width, height), tuple(colour))
    ink, font = "black" if sum(colour) > 384 else "white", ImageFont.load_default(letters)
    draw.text((width // 2, height - 3 * letters // 4), name, ink, font, anchor="mm")
    return np.asarray(made)


def write_image(path: str | Path, painted: np.ndarray) -> None:
    """Write uint8 [height, width, 3] as a picture; raises ExportError when that fails."""
    from PIL import Image

    path = Path(path)
    if not path.name or path.is_dir():
        raise ExportError(f"Cannot write the picture {path}: it is a folder.")
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        Image.fromarray(painted).save(temporary)
        temporary.replace(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"Cannot write the picture {path}: {reason}.") from error
    finally:
        with contextlib.suppress(OSError):  # it would hide why the writing failed
            temporary.unlink()


def prepare(
    images: np.ndarray, size: tuple[int, int], steps: Sequence[Mapping[str, Any]]
) -> np.ndarray:
    """Photos uint8 [B, height, width, 3] as a manifest's `preprocess` steps make them, float32.

    Images float32 of `size` are taken as they are. Raises ExportError for anything else.
    """
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


def _prepared(image: np.ndarray, steps: Sequence[Mapping[str, Any]]) -> np.ndarray:
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
