"""Reading single files of an archive; whatever is wrong with one becomes one sentence."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image, UnidentifiedImageError

from moezoo.errors import UserError

AGAIN = "unpack the archive again or replace the file"


def rgb(path: Path) -> np.ndarray:
    """A colour picture, uint8 [H,W,3]."""
    return _picture(path, "RGB")


def single(path: Path) -> np.ndarray:
    """A grey or palette picture as its stored numbers, uint8 [H,W].

    Raises UserError for pictures of several channels.
    """
    values = _picture(path, None)
    if values.ndim != 2 or values.dtype not in (np.uint8, np.bool_):
        raise UserError(f"'{path}' is no map of 8-bit labels (one channel was expected): {AGAIN}.")
    return values.astype(np.uint8)


def _picture(path: Path, mode: str | None) -> np.ndarray:
    try:
        with Image.open(path) as picture:
            return np.array(picture.convert(mode) if mode else picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"'{path}' cannot be read as a picture: {AGAIN}.") from error


def size_of(path: Path) -> tuple[int, int]:
    """Height and width from a picture's header."""
    try:
        with Image.open(path) as picture:
            return picture.height, picture.width
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise UserError(f"'{path}' cannot be read as a picture: {AGAIN}.") from error


def metres(path: Path) -> np.ndarray:
    """A depth map, float32 [H,W], 0 where unknown.

    Raises UserError for other arrays and for depths that are negative or not finite.
    """
    try:
        depth = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"'{path}' cannot be read as a NumPy array: {AGAIN}.") from error
    if not isinstance(depth, np.ndarray) or depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise UserError(f"'{path}' is no depth map (a two-dimensional array of metres): {AGAIN}.")
    depth = depth.astype(np.float32)
    if not (np.isfinite(depth).all() and (depth >= 0).all()):
        raise UserError(f"'{path}' has depths that are negative or not finite: {AGAIN}.")
    return depth


def matlab(path: Path, name: str) -> Any:
    """One variable of a MATLAB file."""
    try:
        return scipy.io.loadmat(path)[name]
    except KeyError as error:
        raise UserError(f"'{path}' has no variable '{name}': {AGAIN}.") from error
    except Exception as error:  # the reader raises whatever the bytes lead it to
        raise UserError(f"'{path}' cannot be read as a MATLAB file: {AGAIN}.") from error


def check_values(path: Path, values: np.ndarray, allowed: Collection[int], what: str) -> None:
    """UserError naming a value that is not among the allowed ones."""
    table = np.zeros(1 << 16, bool)
    table[list(allowed)] = True
    wrong = ~table[values]
    if wrong.any():
        raise UserError(
            f"'{path}' has the value {values[wrong][0]} at row {np.argwhere(wrong)[0][0]}, "
            f"but {what}: {AGAIN}."
        )


def directions(picture_HW3: np.ndarray) -> np.ndarray:
    """Normals float32 [H,W,3] from the benchmarks' pictures: n = 2 v / 255 - 1."""
    return _DIRECTION[picture_HW3]


_DIRECTION = (2.0 * np.arange(256) / 255.0 - 1.0).astype(np.float32)
