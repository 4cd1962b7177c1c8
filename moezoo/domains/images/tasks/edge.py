"""Edges: cross-entropy with a fixed weight for positives, boundary F-measure (odsF)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.domains.images.tasks.edges import odsf
from moezoo.domains.images.tasks.edges.odsf import Protocol
from moezoo.domains.images.tasks.edges.response import thin_responses
from moezoo.domains.images.thinning import thin
from moezoo.errors import UserError, unknown
from moezoo.label import BINARY
from moezoo.tasks import output, painting
from moezoo.tasks.base import Metric, Scores, State, Task, leaves_out_marked, merge, ratio
from moezoo.tasks.losses import fixed_binary, labelled
from moezoo.tasks.registry import TaskFacts


def probability(logits_BHWC: jax.Array) -> jax.Array:
    """Probability of "edge", float32 [B,H,W]."""
    return jax.nn.sigmoid(logits_BHWC[..., 0].astype(jnp.float32))


def to_bytes_range(logits_BHWC: jax.Array) -> jax.Array:
    """The references' output form: 255 * probability, float32 [B,H,W]; files hold its floor."""
    return 255.0 * probability(logits_BHWC)


@leaves_out_marked
@dataclass(frozen=True)
class BoundaryF(Metric):
    """odsF and oisF with non-maximum suppression, thinning and one-to-one matching.

    Runs on the host, on the rows it is given. Probabilities are rounded down to 8 bits first, as
    in the files that the benchmarks read. Images without any labelled pixel are skipped.
    """

    on_host: ClassVar[bool] = True
    protocol: Protocol = odsf.PROTOCOLS["rooms"]

    def init(self) -> State:
        """Pixel counters per threshold, and the same at each image's best threshold."""
        size = len(self.protocol.thresholds)
        state: State = {k: np.zeros(size, np.int64) for k in odsf.Counts._fields}
        return state | {f"best_{k}": np.zeros((), np.int64) for k in odsf.Counts._fields}

    def count(self, logits_BHWC: Any, label: Any, valid_B: Any = None) -> State:
        """Counters of one batch; label [B,H,W] is the array that the protocol reads."""
        maps = np.floor(np.asarray(to_bytes_range(jnp.asarray(logits_BHWC)))).astype(np.uint8)
        return self.count_bytes(maps, np.asarray(label), valid_B)

    def count_bytes(self, bytes_BHW: np.ndarray, label: np.ndarray, valid_B: Any = None) -> State:
        """Counters of one batch from uint8 probability maps (255 = certain)."""
        rows = np.ones(len(label), bool) if valid_B is None else np.asarray(valid_B, bool)
        state = self.init()
        for row in np.flatnonzero(rows):
            chance = bytes_BHW[row].astype(np.float32) / np.float32(255)
            counts = odsf.count_image(chance, label[row], self.protocol)
            if counts is None:
                continue
            state = merge(state, counts._asdict() | self.at_best(counts))
        return state

    @staticmethod
    def at_best(counts: odsf.Counts) -> State:
        """The part of the state with the counts at each image's own best threshold."""
        return {f"best_{k}": v for k, v in odsf.best_of_image(counts)._asdict().items()}

    def compute(self, state: State) -> Scores:
        """Fractions odsF and oisF, and the threshold at which odsF is reached."""
        f = odsf.f_measure(*(state[k] for k in odsf.Counts._fields))
        best = odsf.f_measure(*(state[f"best_{k}"] for k in odsf.Counts._fields))
        place = int(np.argmax(np.nan_to_num(f)))
        return {
            "odsF": float(f[place]),
            "oisF": float(best),
            "threshold": float(self.protocol.thresholds[place]),
        }


@leaves_out_marked
@dataclass(frozen=True)
class TrainingProxy(Metric):
    """The number that the references log in training: the edge loss on *probabilities as logits*.

    Not a score of edges (the sigmoid is applied twice); kept to compare with their logs. Batches
    count by their labelled pixels, so that the number does not depend on how images share batches.
    """

    positive_weight: float = 0.95

    def init(self) -> State:
        """Sum of the loss over labelled pixels, and their number."""
        return {"loss": np.zeros((), np.float64), "pixels": np.zeros((), np.int64)}

    def count(self, logits_BHWC: Any, label: Any, valid_B: Any = None) -> State:
        """What the pixels of one batch add; label [B,H,W], 1 edge, 255 unlabelled."""
        chance = probability(logits_BHWC)[..., None]
        loss = fixed_binary(chance, label, valid_B, positive_weight=self.positive_weight)
        pixels = jnp.sum(labelled(jnp.asarray(label), valid_B), dtype=jnp.int32)
        return {"loss": loss * pixels, "pixels": pixels}

    def compute(self, state: State) -> Scores:
        """The mean over the labelled pixels; NaN if there are none."""
        return {"loss": float(ratio(state["loss"], state["pixels"]))}


@dataclass(frozen=True)
class Edges(painting.Probability):
    """Edges as benchmarks see them: the thinned lines of a prediction, the lines of a label.

    A pixel is as bright as the highest threshold, of several, at which the benchmark counts it.
    """

    def __call__(self, values: np.ndarray) -> np.ndarray:
        plane = np.asarray(values, np.float32)
        ridges_HW = thin_responses(plane[..., 0] if plane.ndim == 3 else plane, 0)
        limits_T = np.arange(1, 20, dtype=np.float32)[:, None, None] / 20
        return painting.grey(np.max(limits_T * thin(ridges_HW > limits_T), axis=0))

    def label(self, values: np.ndarray) -> np.ndarray:
        return painting.grey(values)


def loss(positive_weight: float = 0.95) -> Callable[..., jax.Array]:
    """The edge loss with this weight for positives (0.95 in both benchmarks)."""
    return partial(fixed_binary, positive_weight=positive_weight)


def task(weight: float = 50.0, positive_weight: float = 0.95, protocol: str = "rooms") -> Task:
    """Labels uint8 [B,H,W], 1 edge, 255 unlabelled; `protocol` names one of `odsf.PROTOCOLS`.

    The PASCAL-Context benchmark scores against region maps, which `Task.scored_on` then names.
    Raises UserError for an unknown protocol and for a weight outside 0 to 1.
    """
    if not 0.0 < positive_weight < 1.0:
        raise UserError(f"Edges' positive_weight is {positive_weight}; it must be between 0 and 1.")
    if protocol not in odsf.PROTOCOLS:
        raise unknown("edge protocol", protocol, list(odsf.PROTOCOLS))
    return Task(
        name="edge",
        channels=1,
        loss=loss(positive_weight),
        metric=BoundaryF(odsf.PROTOCOLS[protocol]),
        headline="odsF",
        lower_is_better=False,
        weight=weight,
        postprocess=probability,
        picture=Edges(),
        label=BINARY,
        output=output.PROBABILITY,
        scored_on=odsf.PROTOCOLS[protocol].reads,
    )


def settings(given: TaskFacts) -> dict[str, Any]:
    """The run's edge protocol; the data set's own if it names none."""
    own = odsf.OF_DATA.get(given.data, "rooms")
    weight = given.protocol.edge_positive_weight
    return {"positive_weight": weight, "protocol": given.protocol.edge or own}
