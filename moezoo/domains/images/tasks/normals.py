"""Surface normals: L1 between unit vectors, angle to the truth pooled over the data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.label import DIRECTION
from moezoo.tasks import output
from moezoo.tasks.base import Metric, Scores, State, Task, only_rows, ratio
from moezoo.tasks.losses import masked_mean
from moezoo.tasks.painting import Fixed, Swatches

FLOOR = 1e-3
TINY = 1e-12
BINS_PER_DEGREE = 10
LIMITS = (11.25, 22.5, 30.0)


def unit(vectors: jax.Array, floor: float = FLOOR) -> jax.Array:
    """Vectors divided by max(length, floor), float32 [...,3].

    Unit vectors for every length above the floor. Below it the map is linear, so the zero vector
    stays 0 and the derivative never exceeds 1/floor (the papers' 1e-12 gives 1e12 there).
    """
    v = vectors.astype(jnp.float32)
    squared = jnp.sum(v * v, axis=-1, keepdims=True)
    return v / jnp.sqrt(jnp.maximum(squared, floor**2))


def directed(label_BHWC: jax.Array) -> jax.Array:
    """Pixels that have a normal: the label is not the zero vector, bool [B,H,W]."""
    return jnp.any(label_BHWC != 0, axis=-1)


def l1_per_entry(
    logits_BHWC: jax.Array, label_BHWC: jax.Array, mask: jax.Array, floor: float = FLOOR
) -> jax.Array:
    """M3ViT's form: |unit(prediction) - normal| averaged over the entries under the mask.

    The mask is [B,H,W,1], or [B,H,W,3] when entries are marked one by one.
    """
    label = jnp.where(mask, label_BHWC, 0.0)
    return masked_mean(jnp.abs(unit(logits_BHWC, floor) - label), mask)


def l1_per_pixel(
    logits_BHWC: jax.Array, label_BHWC: jax.Array, mask_BHW: jax.Array, floor: float = FLOOR
) -> jax.Array:
    """TaskPrompter's form: summed over the three components, averaged over pixels."""
    return 3.0 * l1_per_entry(logits_BHWC, label_BHWC, mask_BHW[..., None], floor)


def loss_m3vit(
    logits_BHWC: jax.Array, label_BHWC: jax.Array, valid_B: jax.Array | None = None
) -> jax.Array:
    """`l1_per_entry` on a batch's label (zero vector = no normal)."""
    mask = only_rows(directed(label_BHWC), valid_B)
    return l1_per_entry(logits_BHWC, label_BHWC, mask[..., None])


def loss_taskprompter(
    logits_BHWC: jax.Array, label_BHWC: jax.Array, valid_B: jax.Array | None = None
) -> jax.Array:
    """`l1_per_pixel` on a batch's label (zero vector = no normal)."""
    return l1_per_pixel(logits_BHWC, label_BHWC, only_rows(directed(label_BHWC), valid_B))


def to_bytes_range(logits_BHWC: jax.Array, floor: float = FLOOR) -> jax.Array:
    """The references' output form: 255 * (unit vector + 1) / 2, float32 [B,H,W,3]."""
    return 127.5 * (unit(logits_BHWC, floor) + 1.0)


def angle(predicted: jax.Array, label: jax.Array) -> jax.Array:
    """Angle in degrees between two vector fields [...,3]; 90 if either is the zero vector.

    2*atan2(|p-g|, |p+g|) stays exact near 0 and 180 degrees, where arccos does not.
    """
    p, g = unit(predicted, TINY), unit(label, TINY)
    apart = jnp.sqrt(jnp.sum((p - g) ** 2, -1))
    along = jnp.sqrt(jnp.sum((p + g) ** 2, -1))
    return jnp.degrees(2.0 * jnp.arctan2(apart, along))


@dataclass(frozen=True)
class NormalAngles(Metric):
    """Angles in degrees, pooled over all pixels with a normal; the median to 0.1 degree."""

    def init(self) -> State:
        """Sum, sum of squares, histogram in bins of 0.1 degree, counts below each limit."""
        return {
            "sum": np.zeros((), np.float64),
            "squares": np.zeros((), np.float64),
            "below": np.zeros(len(LIMITS), np.int64),
            "histogram": np.zeros(180 * BINS_PER_DEGREE, np.int64),
        }

    def count(
        self, logits_BHWC: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Sums of one batch; label float32 [B,H,W,3], zero vector = no normal."""
        mask = only_rows(directed(label), valid_B)
        return self.count_masked(logits_BHWC, label, mask)

    def count_masked(
        self, predicted_BHWC: jax.Array, label: jax.Array, mask_BHW: jax.Array
    ) -> State:
        """Sums of one batch over the pixels under the mask; vectors need not have length 1."""
        degrees = jnp.where(mask_BHW, angle(predicted_BHWC, label), 0.0)
        below = (degrees[..., None] < jnp.asarray(LIMITS)) & mask_BHW[..., None]
        return {
            "sum": jnp.sum(degrees),
            "squares": jnp.sum(degrees**2),
            "below": jnp.sum(below, axis=(0, 1, 2), dtype=jnp.int32),
            "histogram": _histogram(degrees, mask_BHW),
        }

    def compute(self, state: State) -> Scores:
        """Degrees: mean_angle, median_angle, rmse_angle; fractions: within_11.25, ..."""
        pixels = np.sum(state["histogram"])
        scores = {
            "mean_angle": float(ratio(state["sum"], pixels)),
            "median_angle": _median(np.asarray(state["histogram"])),
            "rmse_angle": float(np.sqrt(ratio(state["squares"], pixels))),
        }
        below = ratio(state["below"], pixels)
        return scores | {f"within_{x:g}": float(b) for x, b in zip(LIMITS, below, strict=True)}


def _histogram(degrees: jax.Array, mask: jax.Array) -> jax.Array:
    bins = 180 * BINS_PER_DEGREE
    place = jnp.clip((degrees * BINS_PER_DEGREE).astype(jnp.int32), 0, bins - 1)
    place = jnp.where(mask, place, bins)
    return jnp.zeros(bins, jnp.int32).at[place.ravel()].add(1, mode="drop")


def _median(histogram: np.ndarray) -> float:
    """The mean of the two middle angles (one and the same of an odd number), each by its bin."""
    if not histogram.any():
        return float("nan")
    reached = np.cumsum(histogram)
    middle = np.array([(reached[-1] - 1) // 2, reached[-1] // 2])
    place = np.searchsorted(reached, middle, side="right")
    # The angles of a bin are taken to lie evenly in it.
    inside = (middle - (reached[place] - histogram[place]) + 0.5) / histogram[place]
    return float(np.mean(place + inside) / BINS_PER_DEGREE)


class AngleScores(NamedTuple):
    """Exact statistics of a set of angles, in degrees; shares are fractions."""

    mean: float
    median: float
    rmse: float
    within: tuple[float, ...]


def exact_scores(predicted: np.ndarray, label: np.ndarray, mask: np.ndarray) -> AngleScores:
    """Statistics over the pixels under the mask, on the host in float64; exact median, no bins."""
    p, g = (_unit_float64(x[mask]) for x in (predicted, label))
    apart, along = np.linalg.norm(p - g, axis=-1), np.linalg.norm(p + g, axis=-1)
    degrees = np.degrees(2.0 * np.arctan2(apart, along))
    within = tuple(float(np.mean(degrees < limit)) for limit in LIMITS)
    rmse = float(np.sqrt(np.mean(degrees**2)))
    return AngleScores(float(np.mean(degrees)), float(np.median(degrees)), rmse, within)


def _unit_float64(vectors: np.ndarray) -> np.ndarray:
    v = np.asarray(vectors, np.float64)
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), TINY)


def coloured(normals_HWC: np.ndarray) -> np.ndarray:
    """Unit vectors as (n + 1) / 2 in red, green, blue; the zero vector is black."""
    vectors = np.asarray(normals_HWC, np.float64)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    vectors = vectors / np.maximum(length, 1e-12)
    colours = np.round(127.5 * (np.clip(vectors, -1, 1) + 1)).astype(np.uint8)
    return np.where(length > 0, colours, np.uint8(0))


AXES = {
    "faces right": (1.0, 0.0, 0.0),
    "faces left": (-1.0, 0.0, 0.0),
    "faces up": (0.0, 1.0, 0.0),
    "faces down": (0.0, -1.0, 0.0),
    "faces the viewer": (0.0, 0.0, 1.0),
}


@dataclass(frozen=True)
class Directions(Fixed):
    """Unit vectors in the camera frame (right, up, towards the viewer) in red, green and blue."""

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return coloured(values)

    def key(self, shown: Sequence[np.ndarray]) -> Swatches:
        """The colours of the directions along the axes."""
        return Swatches(tuple(AXES), self(np.array([list(AXES.values())]))[0])


def mean_direction(labels: Iterable[np.ndarray], channels: int) -> np.ndarray:
    """The best constant prediction: the direction of the sum of labels, float32 [channels]."""
    total = sum(label.reshape(-1, channels).sum(0, dtype=np.float64) for label in labels)
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12), np.float32)


def task(weight: float = 10.0) -> Task:
    """Labels float32 [B,H,W,3], unit vectors in the camera frame, zero vector = no normal."""
    return Task(
        name="normals",
        channels=3,
        loss=loss_m3vit,
        metric=NormalAngles(),
        headline="mean_angle",
        lower_is_better=True,
        weight=weight,
        postprocess=unit,
        picture=Directions(),
        label=DIRECTION,
        output=output.VECTOR,
        constant=mean_direction,
    )
