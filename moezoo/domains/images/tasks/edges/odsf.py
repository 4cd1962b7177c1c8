"""The boundary F-measure: counts of one image at every threshold, and the scores of a data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moezoo.domains.images.tasks.edges.boundaries import drawn, from_regions, retraced
from moezoo.domains.images.tasks.edges.matching import matched_pixels
from moezoo.domains.images.tasks.edges.response import thin_responses
from moezoo.domains.images.thinning import thin

HED_THRESHOLDS = (0.001, *(i / 100 for i in range(1, 100)), 0.999)


@dataclass(frozen=True)
class Protocol:
    """How a benchmark turns probability maps and labels into counts.

    tolerance     largest distance of a matched pair, as a share of the image diagonal
    least_pixels  the same in pixels, for images so small that the share is below one pixel
    fade          rows and columns at every border that are damped towards 0
    thresholds    responses strictly above one of them are edges
    reads         the array of a batch that holds the truth
    truth         the boundary, bool [H,W], from that array [H,W]
    ignore        its value in pixels that do not count
    """

    tolerance: float
    least_pixels: float = 0.0
    fade: int = 5
    thresholds: tuple[float, ...] = HED_THRESHOLDS
    reads: str = "edge"
    truth: Callable[[np.ndarray], np.ndarray] = drawn
    ignore: int = 255

    def radius(self, shape: tuple[int, int]) -> float:
        """Largest distance of a matched pair in pixels for an image [H,W]."""
        return max(self.tolerance * math.hypot(*shape), self.least_pixels)


# `pascal_regions` is the benchmark itself and reads its region maps, whose padding is 65535;
# `pascal` reads the drawn lines that are learned.
# `rooms` has its own tolerance and thresholds: its scores are not comparable with the papers'.
PROTOCOLS: dict[str, Protocol] = {
    "rooms": Protocol(
        0.0075, least_pixels=1.5, fade=0, thresholds=tuple(i / 25 - 0.02 for i in range(1, 26))
    ),
    "pascal": Protocol(0.0075),
    "pascal_regions": Protocol(0.0075, reads="regions", truth=from_regions, ignore=65535),
    "nyud": Protocol(0.011, truth=retraced),
}

OF_DATA = {"nyud": "nyud", "pascal": "pascal_regions"}  # a data set's own; others: `rooms`


class Counts(NamedTuple):
    """Boundary pixels of one image at each threshold, int64 [thresholds] each."""

    matched: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray


def count_image(
    probability_HW: np.ndarray, label_HW: np.ndarray, protocol: Protocol
) -> Counts | None:
    """Counts of one image; probability in [0, 1], label as the protocol's `truth` expects it.

    The image is cut to the box of its labelled pixels first (which removes padding, as the
    benchmarks do); ignored pixels inside the box have no edges. None if nothing is labelled.
    """
    label_HW = np.asarray(label_HW)
    counted = label_HW != protocol.ignore
    if not counted.any():
        return None
    box = (_extent(np.any(counted, 1)), _extent(np.any(counted, 0)))
    counted, label_HW, probability_HW = counted[box], label_HW[box], probability_HW[box]
    responses = np.where(counted, thin_responses(probability_HW, protocol.fade), np.float32(0))
    limits = np.asarray(protocol.thresholds, np.float32)
    edges_THW = thin(responses > limits[:, None, None])
    truth = protocol.truth(np.where(counted, label_HW, 0))
    matched = matched_pixels(edges_THW, truth, protocol.radius((truth.shape[0], truth.shape[1])))
    predicted = np.count_nonzero(edges_THW, axis=(1, 2))
    return Counts(matched, predicted, np.full(len(limits), np.count_nonzero(truth)))


def _extent(line: np.ndarray) -> slice:
    places = np.flatnonzero(line)
    return slice(int(places[0]), int(places[-1]) + 1)


def f_measure(matched: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """2PR/(P+R); without predictions P is 1 and R is 0, so F is 0. NaN without truth."""
    total = np.asarray(predicted + actual, np.float64)
    f = 2.0 * matched / np.maximum(total, 1.0)
    return np.where(np.asarray(actual) > 0, f, np.nan)


def best_of_image(counts: Counts) -> Counts:
    """The counts at the image's own best threshold (the lowest in a tie), int64 scalars."""
    best = int(np.argmax(np.nan_to_num(f_measure(*counts))))
    return Counts(*(column[best] for column in counts))
