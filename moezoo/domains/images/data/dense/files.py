"""Reading single files of an archive; any fault in one is reported as one sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moezoo import regular
from moezoo.data import picture
from moezoo.domains.images.data.dense import matlab as read_matlab
from moezoo.errors import UserError

AGAIN = "unpack the archive again or replace the file"
MOST_BYTES = 500 * regular.MB
MOST_INFLATED = 500 * regular.MB
MOST_TEXT = 50 * regular.MB


def rgb(path: Path) -> np.ndarray:
    """A colour picture, uint8 [H,W,3], by the rules of `data.picture`."""
    with _read(path):
        return picture.rgb(path)


def vectors(path: Path) -> np.ndarray:
    """A picture whose colours are numbers, uint8 [H,W,3]: never converted or put on white.

    Raises UserError for pictures that are not plain RGB.
    """
    with _read(path):
        values = picture.stored(path)
    if values.ndim != 3 or values.shape[2] != 3:
        raise UserError(f"'{path}' is not a picture of three plain channels: {AGAIN}.")
    return values


def single(path: Path) -> np.ndarray:
    """A grey or palette picture as its stored numbers, uint8 [H,W].

    Raises UserError for pictures of several channels.
    """
    with _read(path):
        values = picture.stored(path)
    if values.ndim != 2 or values.dtype != np.uint8:
        raise UserError(f"'{path}' is not a map of 8-bit labels (one channel expected): {AGAIN}.")
    return values


def size_of(path: Path) -> tuple[int, int]:
    """Height and width from a picture's header."""
    with _read(path):
        return picture.size_of(path)


def is_plain(path: Path, kind: str | None = None) -> bool:
    """Whether the file's own bytes are what `rgb` would give; see `data.picture.is_plain`."""
    with _read(path):
        return picture.is_plain(path, kind)


@contextmanager
def _read(path: Path) -> Iterator[None]:
    try:
        yield
    except picture.PictureError as error:
        raise UserError(f"'{path}' cannot be read as a picture, it {error}: {AGAIN}.") from error


def metres(path: Path) -> np.ndarray:
    """A depth map, float32 [H,W], 0 where unknown.

    Raises UserError for other arrays and for depths that are negative or not finite.
    """
    regular.check(path, MOST_BYTES, UserError, AGAIN)
    try:
        depth = np.load(path, mmap_mode="r", allow_pickle=False)  # only its header so far
    except Exception as error:  # the reader raises whatever the bytes make it raise
        raise UserError(f"'{path}' cannot be read as a NumPy array: {AGAIN}.") from error
    if not isinstance(depth, np.ndarray) or depth.ndim != 2 or depth.dtype.kind not in "fiu":
        raise UserError(f"'{path}' is not a depth map (a 2-D array of metres): {AGAIN}.")
    if depth.size > picture.MOST_PIXELS:
        raise UserError(f"'{path}' is too large, {depth.shape[0]} x {depth.shape[1]}: {AGAIN}.")
    with np.errstate(over="ignore", invalid="ignore"):  # both are found below
        depth = np.array(depth, np.float32)
    if not (np.isfinite(depth).all() and (depth >= 0).all()):
        raise UserError(f"'{path}' has depths that are negative or not finite: {AGAIN}.")
    return depth


def matlab(path: Path, name: str) -> Any:
    """One variable of a MATLAB file."""
    stored = regular.read(path, MOST_BYTES, UserError, AGAIN)
    try:
        return read_matlab.load(stored, name, MOST_INFLATED)
    except KeyError as error:
        raise UserError(f"'{path}' has no variable '{name}': {AGAIN}.") from error
    except Exception as error:  # the reader raises whatever the bytes make it raise
        reason = f" ({error})" if isinstance(error, read_matlab.MatlabFault) else ""
        raise UserError(f"'{path}' cannot be read as a MATLAB file{reason}: {AGAIN}.") from error


def text(path: Path, what: str = "text", again: str = AGAIN) -> str:
    """The text of a list, with or without a byte order mark; UserError if it is not text."""
    try:
        return regular.read(path, MOST_TEXT, UserError, again).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' cannot be read as {what}: {again}.") from error


def check_values(path: Path, values: np.ndarray, allowed: Collection[int], what: str) -> None:
    """Raise UserError naming a value that is not among the allowed ones."""
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
