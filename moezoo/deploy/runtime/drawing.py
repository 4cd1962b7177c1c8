"""Predictions as pictures and in words, as a manifest's `picture` entry says.

A copy travels in every export. Needs NumPy, and Pillow where a picture is resized or written.
"""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo.deploy.runtime.forms import ExportError
else:
    from forms import ExportError  # pyright: ignore[reportMissingImports]

BLANK = (64, 256)  # height and width of a picture with nothing below its label


def paint(
    manifest: Mapping[str, Any], prediction: np.ndarray, size: Any = None, below: Any = None
) -> np.ndarray:
    """One row of `prediction` as a picture, uint8 [height, width, 3], resized to `size`.

    below: uint8 [height, width, 3], what a prediction of a whole example is written on.
    """
    how = manifest["picture"]
    if how["kind"] in ("label", "number", "sentence"):
        if below is None:
            below = np.zeros((*(size or BLANK), 3), np.uint8)
        if how["kind"] == "sentence":
            return captioned(below, words(manifest, prediction))
        if how["kind"] == "number":
            return tagged(below, words(manifest, prediction), [255] * 3)
        names = manifest["task"].get("labels") or range(len(how["colours"]))
        return tagged(below, str(names[int(prediction)]), how["colours"][int(prediction)])
    size = size or prediction.shape[:2]
    if how["kind"] == "classes":
        colours = np.asarray(how["colours"], np.uint8)
        return colours[resize(prediction.astype(np.int32), size, "nearest")]
    value = resize(prediction.astype(np.float32), size, "bilinear")
    if how["kind"] == "vector":
        value = value / np.maximum(np.linalg.norm(value, axis=-1, keepdims=True), 1e-12)
        return np.round(127.5 * (np.clip(value, -1, 1) + 1)).astype(np.uint8)
    colours = np.asarray(how["colours"], np.uint8)
    share = (value - how["low"]) / (how["high"] - how["low"])
    index = np.clip(share * len(colours), 0, len(colours) - 1).astype(np.int32)
    return np.where((share <= 0)[..., None], np.asarray(how["lowest"], np.uint8), colours[index])


def words(manifest: Mapping[str, Any], prediction: np.ndarray) -> str:
    """What one row of `prediction` says: shares of classes, the range, numbers, or a sentence."""
    how, task = manifest["picture"]["kind"], manifest["task"]
    colours = manifest["picture"].get("colours", ())
    names = task.get("labels") or [f"class {i}" for i in range(len(colours))]
    if how == "label":
        return str(names[int(prediction)])
    if how == "sentence":
        return sentence(manifest["picture"], prediction)
    if how == "classes":
        shares = np.bincount(prediction.ravel(), minlength=len(names)) / prediction.size
        most = [i for i in np.argsort(-shares, kind="stable")[:6] if shares[i] >= 0.005]
        return ", ".join(f"{names[i]} {100 * shares[i]:.0f} %" for i in most)
    if how == "number":
        numbers = ", ".join(f"{value:.4g}" for value in np.atleast_1d(prediction))
        return f"{numbers} ({task['unit']})"
    if how == "range":
        return f"{prediction.min():.3g} to {prediction.max():.3g} ({task['unit']})"
    return str(task["unit"])


def sentence(how: Mapping[str, Any], row: np.ndarray) -> str:
    """A row of numbers as a text: up to the end, without marks, signs next to their words."""
    ids = [int(i) for i in row]
    ids = ids[: ids.index(how["end"])] if how["end"] in ids else ids
    written = " ".join(how["words"][i] for i in ids if i >= how["marks"])
    return written.replace(" .", ".").replace(" ,", ",")


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


def tagged(below: np.ndarray, name: str, colour: list[int]) -> np.ndarray:
    """A picture, uint8 [height, width, 3], with a bar of `colour` and a name at its lower edge."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = below.shape[:2]
    letters = max(8, min(height // 8, 3 * width // 2 // len(name)))
    draw = ImageDraw.Draw(made := Image.fromarray(below))
    draw.rectangle((0, height - 3 * letters // 2, width, height), tuple(colour))
    ink, font = "black" if sum(colour) > 384 else "white", ImageFont.load_default(letters)
    draw.text((width // 2, height - 3 * letters // 4), name, ink, font, anchor="mm")
    return np.asarray(made)


def captioned(below: np.ndarray, text: str, letters: int | None = None) -> np.ndarray:
    """A picture, uint8 [height, width, 3], with a text on black below it: higher than before.

    letters: their size in pixels; None: what suits the picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = below.shape[:2]
    letters = letters or max(8, min(height // 12, width // 20))
    lines = textwrap.wrap(text, max(1, 7 * width // (4 * letters))) or [""]
    line = 3 * letters // 2
    made = Image.new("RGB", (width, height + line * len(lines) + letters // 2))
    made.paste(Image.fromarray(below), (0, 0))
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(letters)
    for i, one in enumerate(lines):
        draw.text((letters // 2, height + letters // 4 + line * i), one, "white", font)
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
