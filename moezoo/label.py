"""Kinds of label, and what follows from a kind: its type, and what padding, mirroring and scaling
an image does to it.

A task declares the kind of its label, a data set that of each label it has; nothing is trained
where the two disagree or one is missing, because whatever moves an image must move its labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from moezoo.errors import UserError

Size = tuple[int, int]
Form = Literal["class", "binary", "value", "vector", "image", "rows"]
Scaled = Literal["kept", "divided", "multiplied"]


@dataclass(frozen=True)
class LabelKind:
    """What a label is.

    form      class: uint8 [H,W], a number per pixel. binary: uint8 [H,W], 0 or 1. value: float32
              [H,W]. vector: float32 [H,W,channels] whose first component points to the right.
              image: uint8, one class for all of the image or clip. rows: arrays that nothing here
              touches (texts).
    unknown   what marks a pixel without label, and fills padding.
    enlarged  what becomes of numbers when the image is enlarged by a factor as if its camera
              stayed: distances are divided, lengths in pixels (flow, disparity) multiplied.
    dtype     another type than the form's, for example uint16 for more than 255 classes.
    """

    form: Form
    unknown: float = 255
    enlarged: Scaled = "kept"
    channels: int = 0
    dtype: str = ""

    def __post_init__(self) -> None:
        for what, value, choices in (
            ("form", self.form, get_args(Form)),
            ("enlarged", self.enlarged, get_args(Scaled)),
        ):
            if value not in choices:
                raise UserError(f"A label's {what} is one of {', '.join(choices)}, not {value!r}.")
        self._check_unknown()
        if np.isnan(self.unknown):  # one object, so that equal kinds are equal
            object.__setattr__(self, "unknown", math.nan)
        if (self.form == "vector") != (self.channels > 0):
            raise UserError("A label has channels where its form is 'vector', and only there.")
        if self.enlarged != "kept" and self.form not in ("value", "vector"):
            raise UserError(f"A label of the form '{self.form}' has no numbers to be scaled.")

    def _check_unknown(self) -> None:
        """UserError for a type that is none of the form's, and one that cannot hold `unknown`."""
        wanted = "iu" if self.classes else "f"
        names = {"iu": "a type of whole numbers", "f": "a type of floats"}[wanted]
        try:
            kind = self.type
        except TypeError:
            kind = np.dtype("O")
        if kind.kind not in wanted:
            raise UserError(f"A label of the form '{self.form}' has {names}, not '{self.dtype}'.")
        try:
            fits = not self.classes or kind.type(self.unknown) == self.unknown
        except (OverflowError, ValueError, TypeError):
            fits = False
        if not fits or not isinstance(self.unknown, int | float | np.number):
            raise UserError(
                f"A label of the type {kind.name} cannot mark pixels as unknown with "
                f"{self.unknown!r}: give another `unknown`, or a dtype that holds it."
            )

    @property
    def per_pixel(self) -> bool:
        """Whether it is a map: whatever moves the image moves it."""
        return self.form not in ("image", "rows")

    @property
    def classes(self) -> bool:
        """Whether its numbers stand for classes."""
        return self.form in ("class", "binary", "image")

    @property
    def type(self) -> np.dtype:
        """Of its arrays."""
        return np.dtype(self.dtype or ("uint8" if self.classes else "float32"))

    def shape(self, size: Size) -> tuple[int, ...]:
        """Of the label of an image of this size."""
        if not self.per_pixel:
            return ()
        return (*size, self.channels) if self.channels else size

    def blank(self, size: Size) -> np.ndarray:
        """A label that is unknown everywhere."""
        return np.full(self.shape(size), self.unknown, self.type)

    def mirrored(self, values: np.ndarray) -> np.ndarray:
        """The map with left and right exchanged; vectors point the other way, too."""
        turned = values[:, ::-1]
        if self.form == "vector":
            known = self.known(turned)[..., 0]
            turned = turned.copy()
            turned[..., 0] = np.where(known, -turned[..., 0], turned[..., 0])
        return turned

    def scaled(self, values: np.ndarray, factor: float) -> np.ndarray:
        """The numbers of a map whose image was enlarged by `factor`; unknown ones stay so."""
        if self.enlarged == "kept":
            return values
        by = values.dtype.type(factor)
        made = values / by if self.enlarged == "divided" else values * by
        return made if self.unknown == 0 else np.where(self.known(values), made, values)

    def known(self, values: np.ndarray) -> np.ndarray:
        """Which numbers of a map are not marked as unknown; a vector is or is not as a whole."""
        found = ~np.isnan(values) if np.isnan(self.unknown) else values != self.unknown
        if self.form == "vector":
            found = np.broadcast_to(found.any(axis=-1, keepdims=True), values.shape)
        return found


CLASSES = LabelKind("class")
BINARY = LabelKind("binary")
DISTANCE = LabelKind("value", unknown=0, enlarged="divided")  # metres, 0 where not measured
DIRECTION = LabelKind("vector", unknown=0, channels=3)  # unit vectors in the camera's frame
IMAGE = LabelKind("image")
ROWS = LabelKind("rows")


def value(unknown: float, enlarged: Scaled = "kept") -> LabelKind:
    """A number per pixel; `unknown` marks those without one and must be no number that occurs."""
    return LabelKind("value", unknown, enlarged)


def declared(kind: Any, what: str, how: str) -> LabelKind:
    """The kind; UserError if it is not a kind: "<what> does not say ...: <how>"."""
    if isinstance(kind, LabelKind):
        return kind
    raise UserError(
        f"{what} does not say what kind of label it has, which decides how it is padded, "
        f"mirrored and scaled: {how} one of moezoo.label (CLASSES, BINARY, "
        "DISTANCE, DIRECTION, value(...), IMAGE)."
    )
