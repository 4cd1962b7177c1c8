"""Reading one map of labels, in the form and the units of its kind, at its own size.

class    a picture of one channel, grey or palette, whose numbers are the classes; 255 unlabelled
binary   likewise: 0 and 1, or 0 and 255
metres   a 16-bit picture of whole numbers, whose unit `folder.json` gives; or an array of floats,
         in metres unless a unit is given. 0 where not measured
normals  an 8-bit picture of (v + 1) / 2 * 255, or an array of vectors; 0, or grey 127 or 128 in a
         picture, where unknown
others   an array of floats

A depth map is refused if half of it lies beyond the upper end of the range of depths (it is in
other units than it says) or all of it below the lower end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moezoo import regular
from moezoo.data import picture
from moezoo.domains.images.data.folder.settings import FILE, FolderSettings
from moezoo.errors import UserError
from moezoo.label import DIRECTION, DISTANCE, LabelKind

WHITE = 255
GREYS = (127, 128)  # both are called the middle of 0 to 255
UNIT_LENGTHS = (0.8, 1.2)  # of normals in a file, in the middle; 8 bits alone cost less than 0.01
SIGNATURE = b"\xff\xd8\xff"  # of JPEG, whatever the file is called


class MapFile(NamedTuple):
    """A map in a file of its own: a picture, or an array (`.npy`)."""

    path: Path

    def __str__(self) -> str:
        return f"'{self.path}'"

    @property
    def is_array(self) -> bool:
        """Whether it is an array of NumPy's."""
        return self.path.suffix.lower() == ".npy"

    def array(self) -> np.ndarray:
        """The array, not read yet. Raises UserError."""
        return _opened_array(self.path)

    def content(self) -> bytes:
        """The bytes of the picture. Raises UserError."""
        return regular.read(self.path, picture.MOST_BYTES, UserError)


class MapCell(NamedTuple):
    """A map, always a picture, in a cell of a table; `place` says which."""

    place: str
    bytes_of: Callable[[], bytes]

    def __str__(self) -> str:
        return self.place

    @property
    def is_array(self) -> bool:
        """Whether it is an array of NumPy's."""
        return False

    def array(self) -> np.ndarray:
        """Raises UserError: there are pictures only."""
        raise UserError(f"{self.place} is no picture: save it as PNG.")

    def content(self) -> bytes:
        """The bytes of the picture. Raises UserError."""
        return self.bytes_of()


Given = MapFile | MapCell


@dataclass(frozen=True)
class MapReader:
    """Reads the maps of one task.

    classes: how many there are; None: not known yet, then a map may have any below 255.
    """

    task: str
    kind: LabelKind
    settings: FolderSettings
    classes: int | None = None

    def __call__(self, given: Given) -> np.ndarray:
        """A map in the form of its kind (`moezoo.label`). Raises UserError naming the file."""
        if self.kind.form == "class":
            return self._classes(given)
        if self.kind.form == "binary":
            return self._binary(given)
        if self.kind == DISTANCE:
            return self._metres(given)
        if self.kind == DIRECTION:
            return _directions(given)
        form, nan = self.kind.shape((1, 1)), bool(np.isnan(self.kind.unknown))
        return _array(given, "fiu", form, nan).astype(self.kind.type)

    def _classes(self, given: Given) -> np.ndarray:
        values = _indices(given)
        unlabelled = values == WHITE
        if (own := self.settings.unlabelled.get(self.task)) is not None:
            unlabelled |= values == own
        count = WHITE if self.classes is None else self.classes
        wrong = ((values < 0) | (values >= count)) & ~unlabelled
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            advice = (
                f"correct the file, or name all classes in {FILE}"
                if self.classes is not None
                else "a class is a number from 0 to 254, and 255 means no label"
            )
            raise UserError(
                f"{given} has the class {values[row, column]} at row {row}, column {column}, but "
                f"{self.task} has the classes 0 to {count - 1}: {advice}."
            )
        return np.where(unlabelled, self.kind.unknown, values).astype(self.kind.type)

    def _binary(self, given: Given) -> np.ndarray:
        values = _indices(given)
        unlabelled = np.zeros(values.shape, bool)
        if (own := self.settings.unlabelled.get(self.task)) is not None:
            unlabelled = values == own
        found = np.unique(values[~unlabelled])
        if not (set(found) <= {0, 1} or set(found) <= {0, WHITE}):
            raise UserError(
                f"{given} has the numbers {', '.join(map(str, found[:5]))}"
                f"{', ...' if len(found) > 5 else ''}, but {self.task} is 0 and 1, or 0 and 255: "
                f"correct the file, or say in {FILE} which number has no label, "
                f'"unlabelled": {{"{self.task}": {found[-1]}}}.'
            )
        return np.where(unlabelled, self.kind.unknown, values != 0).astype(self.kind.type)

    def _metres(self, given: Given) -> np.ndarray:
        if given.is_array:
            values = _array(given, "fiu", (1, 1))
        else:
            values = _stored(given)
            if values.ndim != 2 or values.dtype != np.uint16:
                what = "8 bits" if values.ndim == 2 else f"{values.shape[2]} channels"
                raise UserError(
                    f"{given} has {what}, too few steps for depth: save 16 bits of one channel, "
                    "or an array of floats (.npy)."
                )
        unit = self.settings.unit
        if unit is None and values.dtype.kind != "f":
            raise UserError(
                f"{given} has depth in whole numbers of a unit that is not given: write "
                f'"depth": {{"unit": "mm"}} into {FILE} (or "cm", "m", or metres per number).'
            )
        with np.errstate(over="ignore"):
            depth = (values.astype(np.float64) * (unit or 1.0)).astype(np.float32)
        if not (depth >= 0).all():
            raise UserError(f"{given} has negative depths: write 0 where nothing was measured.")
        self._check_range(given, depth[depth > 0])
        return depth

    def _check_range(self, given: Given, known: np.ndarray) -> None:
        """UserError for depths (those that were measured) in another unit than they are given."""
        if not known.size:
            return
        (low, high), middle, most = self.settings.depths, float(np.median(known)), known.max()
        if middle > high:
            what = f"has depths of {middle:,.4g} m in the middle, beyond {high:,.4g} m"
        elif most < low:
            what = f"has no depth above {most:.2g} m, below {low:g} m"
        else:
            return
        raise UserError(
            f"{given} {what}, which looks like another unit: write "
            f'"depth": {{"unit": "mm"}}, "cm", "m" or metres per number into {FILE}, or "range": '
            "[low, high] in metres if they are right."
        )


def size_of(path: Path) -> tuple[int, int]:
    """Height and width of an image or a map from its header. Raises UserError."""
    if path.suffix.lower() != ".npy":
        with reading(f"'{path}'"):
            return picture.size_of(path)
    shape = _opened_array(path).shape
    if len(shape) < 2:
        raise UserError(f"'{path}' has the shape {shape}, which is no map: save [height, width].")
    return int(shape[0]), int(shape[1])


def image(path: Path) -> np.ndarray:
    """An image, uint8 [H,W,3], by the rules of `data.picture`. Raises UserError."""
    with reading(f"'{path}'"):
        return picture.rgb(path)


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Makes a sentence of what is wrong with a picture; place: where it lies."""
    try:
        yield
    except picture.PictureError as error:
        raise UserError(f"{place} {error}: replace the file.") from error


def _stored(given: Given) -> np.ndarray:
    content = given.content()
    with reading(str(given)):
        if content.startswith(SIGNATURE):
            raise picture.PictureError("is a JPEG, which changes the numbers of labels")
        return picture.stored(content)


def _indices(given: Given) -> np.ndarray:
    """The numbers of a map of classes [H,W]."""
    if given.is_array:
        return _array(given, "iub", (1, 1))
    values = _stored(given)
    if values.ndim != 2:
        raise UserError(
            f"{given} has {values.shape[2]} channels of colour, where one number for each pixel "
            "says the class: save it as grey or with a palette."
        )
    return values


def _directions(given: Given) -> np.ndarray:
    """Unit vectors, float32 [H,W,3], 0 where unknown."""
    if given.is_array:
        vectors = _array(given, "f", (1, 1, 3)).astype(np.float32)
        known = vectors.any(axis=-1)
    else:
        values = _stored(given)
        if values.ndim != 3 or values.shape[2] != 3:
            raise UserError(
                f"{given} is not a picture of three plain channels, as normals are: save it as "
                "8-bit RGB, or as an array (.npy)."
            )
        known = values.any(axis=-1)
        for grey in GREYS:
            known &= (values != grey).any(axis=-1)
        vectors = values.astype(np.float32) / np.float32(127.5) - 1
    lengths = np.linalg.norm(vectors, axis=-1)
    if (
        known.any()
        and not UNIT_LENGTHS[0] < (middle := np.median(lengths[known])) < UNIT_LENGTHS[1]
    ):
        raise UserError(
            f"{given} has vectors of length {middle:.3g} in the middle, which are no normals: "
            "save (n + 1) / 2 * 255 as a picture, or the unit vectors themselves as an array."
        )
    scale = np.where(known, np.maximum(lengths, 1e-6), np.float32(np.inf))
    return vectors / scale[..., None]


def _opened_array(path: Path) -> np.ndarray:
    """An array whose numbers are not read yet."""
    regular.check(path, picture.MOST_BYTES, UserError)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the reader raises whatever the bytes make it raise
        raise UserError(f"'{path}' cannot be read as a NumPy array: replace the file.") from error
    if not isinstance(found, np.ndarray):
        raise UserError(f"'{path}' is an archive of arrays: save one array (.npy).")
    return found


def _array(given: Given, kinds: str, form: tuple[int, ...], nan: bool = False) -> np.ndarray:
    """An array [H,W,...] of one of NumPy's kinds of numbers; `form` says its last axes.

    nan: whether that number means something.
    """
    values = given.array()
    if values.ndim != len(form) or values.shape[2:] != form[2:] or 0 in values.shape:
        wanted = ", ".join(["height", "width", *map(str, form[2:])])
        raise UserError(
            f"{given} has the shape {values.shape}, not [{wanted}]: save it in this form."
        )
    if values.dtype.kind not in kinds:
        words = "floats" if kinds == "f" else "numbers" if "f" in kinds else "whole numbers"
        raise UserError(f"{given} has values of the type {values.dtype}: save {words}.")
    if values.size > 4 * picture.MOST_PIXELS:
        raise UserError(f"{given} has too many numbers, {values.size:,}: make it smaller.")
    values = np.array(values)
    if values.dtype.kind == "f" and not (np.isfinite(values) | (nan & np.isnan(values))).all():
        raise UserError(
            f"{given} has numbers that are not finite (NaN): write 0 where nothing was measured."
        )
    return values.astype(np.uint8) if values.dtype.kind == "b" else values
