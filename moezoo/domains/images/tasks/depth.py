"""Depth in metres: L1 loss, root mean square error pooled over all pixels of the data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.label import DISTANCE
from moezoo.tasks.base import Metric, Scores, State, Task, only_rows, ratio
from moezoo.tasks.losses import masked_mean
from moezoo.tasks.output import TaskOutput, relative_rms
from moezoo.tasks.painting import Scale, plane, scale

Validity = Callable[[jax.Array], jax.Array]
SMALLEST = 1e-9


def measured(label_BHW: jax.Array) -> jax.Array:
    """Pixels with a depth: positive and finite (0 marks a missing measurement)."""
    return (label_BHW > 0) & jnp.isfinite(label_BHW)


def within_80_metres(label_BHW: jax.Array) -> jax.Array:
    """TaskPrompter's evaluation mask: 0 < depth < 80 m."""
    return (label_BHW > 0) & (label_BHW < 80)


def not_marked(mark: float) -> Validity:
    """Pixels whose label is not `mark` (255 in M3ViT and InvPT, -1 in TaskPrompter)."""
    return lambda label_BHW: label_BHW != mark


def l1(
    logits_BHWC: jax.Array,
    label_BHW: jax.Array,
    valid_B: jax.Array | None = None,
    *,
    validity: Validity = measured,
) -> jax.Array:
    """Mean |prediction - depth| over the valid pixels, in metres, float32."""
    mask = only_rows(validity(label_BHW), valid_B)
    label = jnp.where(mask, label_BHW, 0.0).astype(jnp.float32)
    return masked_mean(jnp.abs(logits_BHWC[..., 0].astype(jnp.float32) - label), mask)


def metres(logits_BHWC: jax.Array) -> jax.Array:
    """Predicted depth in metres, never negative, float32 [B,H,W]."""
    return jnp.maximum(logits_BHWC[..., 0].astype(jnp.float32), 0.0)


@dataclass(frozen=True)
class DepthErrors(Metric):
    """Errors pooled over all valid pixels; predictions that are not positive become 1e-9 m."""

    validity: Validity = measured

    def init(self) -> State:
        """Number of pixels, of those within a factor 1.25, and sums of errors."""
        sums = ("squared", "squared_log", "relative", "squared_relative")
        zeros = {k: np.zeros((), np.float64) for k in sums}
        return {"pixels": np.zeros((), np.int64), "close": np.zeros((), np.int64)} | zeros

    def count(
        self, logits_BHWC: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Sums of one batch from predictions [B,H,W,1]; label float32 [B,H,W] in metres."""
        mask = only_rows(self.validity(label), valid_B)
        truth = jnp.where(mask, label, 1.0).astype(jnp.float32)
        predicted = logits_BHWC[..., 0].astype(jnp.float32)
        predicted = jnp.where(mask, predicted, 1.0)
        predicted = jnp.where(predicted > 0, predicted, SMALLEST)
        error = jnp.abs(predicted - truth)
        close = jnp.maximum(predicted / truth, truth / predicted) < 1.25
        sums = {
            "squared": error**2,
            "squared_log": (jnp.log(truth) - jnp.log(predicted)) ** 2,
            "relative": error / truth,
            "squared_relative": error**2 / truth,
        }
        state: State = {k: jnp.sum(v) for k, v in sums.items()}
        state["pixels"] = jnp.sum(mask, dtype=jnp.int32)
        state["close"] = jnp.sum(close & mask, dtype=jnp.int32)
        return state

    def compute(self, state: State) -> Scores:
        """rmse [m], log_rmse, abs_rel, sq_rel [m], and the share of pixels within a factor 1.25."""
        n = state["pixels"]
        return {
            "rmse": float(np.sqrt(ratio(state["squared"], n))),
            "log_rmse": float(np.sqrt(ratio(state["squared_log"], n))),
            "abs_rel": float(ratio(state["relative"], n)),
            "sq_rel": float(ratio(state["squared_relative"], n)),
            "within_1.25": float(ratio(state["close"], n)),
        }


def on_scale(depth_HW: np.ndarray, near: float = 0.0, far: float = 10.0) -> np.ndarray:
    """Labels of depth from `near` to `far` metres on `scale`; 0 or less, unmeasured, is black."""
    plane_HW = plane(depth_HW)
    known_HW = np.isfinite(plane_HW) & (plane_HW > 0)
    return np.where(known_HW[..., None], scale(depth_HW, near, far), np.uint8(0))


@dataclass(frozen=True)
class Metres:
    """Depth from `near` (bright) to `far` (dark); unmeasured pixels of labels are black.

    Values outside the scale get the colour of its end, including a prediction of 0 m.
    """

    near: float = 0.0
    far: float = 10.0

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return scale(values, self.near, self.far)

    def label(self, values: np.ndarray) -> np.ndarray:
        return on_scale(values, self.near, self.far)

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
        return Scale("metres", self.near, self.far, scale(steps, self.near, self.far))


def mean_depth(labels: Iterable[np.ndarray], channels: int) -> np.ndarray:
    """The best constant prediction: the mean depth of the measured pixels, float32 [channels]."""
    total, pixels = 0.0, 0
    for label in labels:
        total += float(label[label > 0].sum(dtype=np.float64))
        pixels += int((label > 0).sum())
    return np.full(channels, total / max(pixels, 1), np.float32)


OUTPUT = TaskOutput(
    "range",
    "metres",
    relative_rms,
    "the depth maps differ by more than {} % (root mean square, relative to the full model's)",
)


def task(weight: float = 1.0, far: float = 10.0) -> Task:
    """Labels float32 [B,H,W] in metres, 0 unmeasured; pictures run from 0 to `far` metres unless
    their range is fitted to what they show."""
    return Task(
        name="depth",
        channels=1,
        loss=l1,
        metric=DepthErrors(),
        headline="rmse",
        lower_is_better=True,
        weight=weight,
        postprocess=metres,
        picture=Metres(0.0, far),
        label=DISTANCE,
        output=OUTPUT,
        constant=mean_depth,
    )
