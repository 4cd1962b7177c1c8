"""How a task's maps are painted, and the key that a reader of the picture needs.

A painting is a function from one post-processed prediction to uint8 [H,W,3], and has another for
labels, which may say "unknown". `fitted` to the labels that are shown it uses its whole scale, and
`key` says what its colours mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from moezoo.tasks import pictures
from moezoo.tasks.edges.response import thin_responses
from moezoo.tasks.edges.thinning import thin


@dataclass(frozen=True)
class Swatches:
    """A key of colours with a name each; colours uint8 [n,3]."""

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
        """The painting whose scale spans these labels; the same where the scale is fixed."""
        ...

    def key(self, shown: Sequence[np.ndarray]) -> Key | None:
        """What the colours of these maps mean; None where the picture says it itself."""
        ...


class _Fixed:
    """A painting whose scale does not depend on what is shown, of predictions as of labels."""

    def label(self, values: np.ndarray) -> np.ndarray:
        return self(values)  # type: ignore[operator]

    def fitted(self, labels: Sequence[np.ndarray]) -> Painting:
        return self  # type: ignore[return-value]


@dataclass(frozen=True)
class ClassColours(_Fixed):
    """Class maps in the data set's colours; 255 (unlabelled) is black.

    Without names classes are numbered, without colours they get those of `pictures.palette`.
    """

    classes: int
    names: tuple[str, ...] = ()
    colours: np.ndarray | None = field(default=None, compare=False)

    def table(self) -> np.ndarray:
        """The colours, uint8 [classes,3]."""
        return pictures.palette(self.classes) if self.colours is None else self.colours

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return pictures.classes(values, self.table())

    def key(self, shown: Sequence[np.ndarray]) -> Swatches:
        """The classes that occur in what is shown."""
        occur = [c for c in range(self.classes) if any(np.any(np.asarray(v) == c) for v in shown)]
        names = [self.names[c] if c < len(self.names) else f"class {c}" for c in occur]
        return Swatches(tuple(names), self.table()[occur])


@dataclass(frozen=True)
class Metres:
    """Depth from `near` (bright) to `far` (dark); unmeasured pixels of labels are black.

    What lies outside of the scale gets the colour of its end: a prediction of 0 m, too.
    """

    near: float = 0.0
    far: float = 10.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return pictures.scale(values, self.near, self.far)

    def label(self, values: np.ndarray) -> np.ndarray:
        return pictures.depth(values, self.near, self.far)

    def fitted(self, labels: Sequence[np.ndarray]) -> Metres:
        """From the nearest to the farthest of 98 % of the measured pixels, in half metres."""
        known = np.concatenate([v[(v > 0) & np.isfinite(v)] for v in map(np.asarray, labels)])
        if not known.size:
            return self
        low, high = np.percentile(known, (1, 99))
        near = float(np.floor(2 * low) / 2)
        return replace(self, near=near, far=max(float(np.ceil(2 * high) / 2), near + 0.5))

    def key(self, shown: Sequence[np.ndarray]) -> Scale:
        """The scale in metres."""
        steps = np.linspace(self.near, self.far, 256)
        return Scale("metres", self.near, self.far, pictures.scale(steps, self.near, self.far))


@dataclass(frozen=True)
class Probability(_Fixed):
    """Probabilities or 0/1 labels from black to white; 255 (unlabelled) is mid-grey."""

    unit: str = "probability"

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return pictures.grey(values)

    def key(self, shown: Sequence[np.ndarray]) -> Scale:
        """From 0 to 1."""
        steps = np.arange(256)
        return Scale(self.unit, 0.0, 1.0, np.repeat(steps[:, None], 3, 1).astype(np.uint8))


@dataclass(frozen=True)
class Edges(Probability):
    """Edges as benchmarks see them: of a prediction the thinned lines, of a label its lines.

    A pixel is as bright as the highest of some thresholds at which the benchmark counts it.
    """

    def __call__(self, values: np.ndarray) -> np.ndarray:
        plane = np.asarray(values, np.float32)
        ridges_HW = thin_responses(plane[..., 0] if plane.ndim == 3 else plane, 0)
        limits_T = np.arange(1, 20, dtype=np.float32)[:, None, None] / 20
        return pictures.grey(np.max(limits_T * thin(ridges_HW > limits_T), axis=0))

    def label(self, values: np.ndarray) -> np.ndarray:
        return pictures.grey(values)


AXES = {
    "faces right": (1.0, 0.0, 0.0),
    "faces left": (-1.0, 0.0, 0.0),
    "faces up": (0.0, 1.0, 0.0),
    "faces down": (0.0, -1.0, 0.0),
    "faces the viewer": (0.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class Directions(_Fixed):
    """Unit vectors in the camera frame (right, up, towards the viewer) in red, green and blue."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return pictures.normals(values)

    def key(self, shown: Sequence[np.ndarray]) -> Swatches:
        """The colours of the directions along the axes."""
        return Swatches(tuple(AXES), self(np.array([list(AXES.values())]))[0])


@dataclass(frozen=True)
class Words(_Fixed):
    """Pictures that say themselves what they show: `paint` writes a name or draws nothing."""

    paint: Callable[[np.ndarray], np.ndarray]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.paint(values)

    def key(self, shown: Sequence[np.ndarray]) -> None:
        """None."""
        return None
