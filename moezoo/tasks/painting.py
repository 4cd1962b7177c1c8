"""How predictions and labels become pictures, and the key that readers of a picture need.

A painting is a function from one post-processed prediction to uint8 [H,W,3], and has another for
labels, which may say "unknown". `fitted` to the labels shown, it uses its whole scale, and
`key` says what its colours mean. Paintings used by only one task are in that task's file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

UNLABELLED = 255
GREY = 128
TILE = 160  # side of a name tag, in pixels
DARK = 0.25
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_OKLAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@cache
def palette(count: int) -> np.ndarray:
    """`count` distinct colours, uint8 [count,3]; the first `n` do not depend on `count`.

    Each colour is the one of 1,000 that looks most different from black and all previous ones.
    """
    level = np.linspace(40, 240, 10).round()
    candidates = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3)
    look = _perceived(candidates)
    # Without the margin, almost black counts as very different from every bright colour.
    nearest = np.linalg.norm(look - _perceived(np.zeros(3)), axis=-1) - DARK
    chosen = []
    for _ in range(count):
        chosen.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.linalg.norm(look - look[chosen[-1]], axis=-1))
    return candidates[chosen].astype(np.uint8).reshape(count, 3)


def _perceived(colours: np.ndarray) -> np.ndarray:
    """sRGB 0..255 to Oklab (Ottosson 2020), where Euclidean distance is visible difference."""
    share = colours / 255.0
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ TO_CONES.T) @ TO_OKLAB.T


def classes(map_HW: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A class map in these colours, uint8 [classes,3]; numbers of no class (255) are black."""
    labels = np.asarray(map_HW).astype(np.int64)
    none = (labels < 0) | (labels >= len(colours))
    colours = colours[np.clip(labels, 0, len(colours) - 1)]
    return np.where(none[..., None], np.uint8(0), colours)


def name_tag(label: np.ndarray, names: Sequence[str], count: int) -> np.ndarray:
    """A tile in the palette's colour of one class, with its name on it; 255 (unlabelled) is black.

    For predictions of whole images: `label` is one number.
    """
    index = int(label)
    known = index != UNLABELLED
    colour = tuple(int(c) for c in palette(count)[index]) if known else (0, 0, 0)
    words = names[index] if known and index < len(names) else f"class {index}" if known else "none"
    return _tile(words, colour)


def number_tag(value: np.ndarray) -> np.ndarray:
    """A tile with one number on it, or a few below each other: for tasks that predict numbers."""
    words = " ".join(f"{float(number):.4g}" for number in np.atleast_1d(value))
    return _tile(words, (0, 0, 0))


def _tile(words: str, colour: tuple[int, ...]) -> np.ndarray:
    tile = Image.new("RGB", (TILE, TILE), colour)
    ink = "black" if np.mean(colour) > GREY else "white"
    middle, font = (TILE // 2, TILE // 2), ImageFont.load_default(size=TILE // 6)
    ImageDraw.Draw(tile).multiline_text(
        middle, words.replace(" ", "\n"), ink, font, anchor="mm", align="center"
    )
    return np.asarray(tile)


def scale(values_HW: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values from `low` (bright) to `high` (dark) in viridis; those outside look like the ends."""
    values = np.nan_to_num(plane(values_HW).astype(np.float64), nan=high)
    share = np.clip((values - low) / (high - low), 0.0, 1.0)
    return matplotlib.colormaps["viridis"](1.0 - share, bytes=True)[..., :3]


def grey(values_HW: np.ndarray) -> np.ndarray:
    """Probabilities or 0/1 labels from black to white; 255 (unlabelled) is mid-grey."""
    values = np.nan_to_num(plane(values_HW).astype(np.float64))
    bright = np.round(255 * np.clip(values, 0, 1))
    bright = np.where(values == UNLABELLED, GREY, bright).astype(np.uint8)
    return np.repeat(bright[..., None], 3, axis=-1)


def plane(values: np.ndarray) -> np.ndarray:
    """A map [H,W] from one given as [H,W] or [H,W,1]."""
    values = np.asarray(values)
    return values[..., 0] if values.ndim == 3 else values


@dataclass(frozen=True)
class Swatches:
    """A key of named colours; colours uint8 [n,3]."""

    names: tuple[str, ...]
    colours: np.ndarray


@dataclass(frozen=True)
class Scale:
    """A key that runs from `low` to `high` in some unit; colours uint8 [n,3], low ones first."""

    unit: str
    low: float
    high: float
    colours: np.ndarray


Key = Swatches | Scale


class Painting(Protocol):
    """A function from one map to a picture, with a key."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """One prediction as uint8 [H,W,3]."""
        ...

    def label(self, values: np.ndarray) -> np.ndarray:
        """One label as uint8 [H,W,3]."""
        ...

    def fitted(self, labels: Sequence[np.ndarray]) -> Painting:
        """The painting whose scale spans these labels; the same one if the scale is fixed."""
        ...

    def key(self, shown: Sequence[np.ndarray]) -> Key | None:
        """What the colours of these maps mean; None if the picture says it itself."""
        ...


class Fixed:
    """A painting whose scale does not depend on what is shown, the same for labels."""

    def label(self, values: np.ndarray) -> np.ndarray:
        return self(values)  # type: ignore[operator]

    def fitted(self, labels: Sequence[np.ndarray]) -> Painting:
        return self  # type: ignore[return-value]


@dataclass(frozen=True)
class ClassColours(Fixed):
    """Class maps in the data set's colours; 255 (unlabelled) is black.

    Without names, classes are numbered; without colours, they get those of `palette`.
    """

    classes: int
    names: tuple[str, ...] = ()
    colours: np.ndarray | None = field(default=None, compare=False)

    def table(self) -> np.ndarray:
        """The colours, uint8 [classes,3]."""
        return palette(self.classes) if self.colours is None else self.colours

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return classes(values, self.table())

    def key(self, shown: Sequence[np.ndarray]) -> Swatches:
        """The classes that occur in the maps shown."""
        occur = [c for c in range(self.classes) if any(np.any(np.asarray(v) == c) for v in shown)]
        names = [self.names[c] if c < len(self.names) else f"class {c}" for c in occur]
        return Swatches(tuple(names), self.table()[occur])


@dataclass(frozen=True)
class Probability(Fixed):
    """Probabilities or 0/1 labels from black to white; 255 (unlabelled) is mid-grey."""

    unit: str = "probability"

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return grey(values)

    def key(self, shown: Sequence[np.ndarray]) -> Scale:
        """From 0 to 1."""
        steps = np.arange(256)
        return Scale(self.unit, 0.0, 1.0, np.repeat(steps[:, None], 3, 1).astype(np.uint8))


@dataclass(frozen=True)
class WordKey(Fixed):
    """Pictures that need no key: `paint` writes a name or draws nothing."""

    paint: Callable[[np.ndarray], np.ndarray]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.paint(values)

    def key(self, shown: Sequence[np.ndarray]) -> None:
        """None."""
        return None
