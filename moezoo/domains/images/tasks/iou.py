"""Intersection over union, pooled over a data set, and what all tasks on class maps share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.tasks.base import Metric, Scores, State, leaves_out_marked, only_rows
from moezoo.tasks.losses import labelled
from moezoo.tasks.registry import TaskFacts


def all_rows(label_BHW: jax.Array) -> jax.Array:
    """Every image counts."""
    return jnp.ones(label_BHW.shape[0], bool)


def rows_with_objects(label_BHW: jax.Array) -> jax.Array:
    """Images with at least one pixel that is neither background (0) nor unlabelled."""
    return jnp.any(labelled(label_BHW) & (label_BHW != 0), axis=(1, 2))


def class_map(logits_BHWC: jax.Array) -> jax.Array:
    """The most likely class of each pixel, int32 [B,H,W]."""
    return jnp.argmax(logits_BHWC, axis=-1).astype(jnp.int32)


def settings(given: TaskFacts) -> dict[str, Any]:
    """Settings of tasks on class maps: the data set's classes, the run's class balance."""
    return given.classes() | {
        "class_balance": given.class_balance,
        "names": given.names,
        "colours": given.colours,
    }


@leaves_out_marked
@dataclass(frozen=True)
class IoU(Metric):
    """Mean intersection over union.

    `mIoU` is the benchmarks' number: the mean over all `classes`, where a class that appears
    neither in truth nor in prediction counts 0. `mIoU_present` leaves such classes out,
    `mIoU_foreground` class 0, the background of PASCAL-Context and of parts.
    Images for which `counted` is False add nothing at all (TaskPrompter and M3ViT leave
    images without people out of the parts score).
    """

    classes: int
    counted: Callable[[jax.Array], jax.Array] = all_rows

    def init(self) -> State:
        """Per-class pixel counters: intersection, prediction, truth."""
        return {k: np.zeros(self.classes, np.int64) for k in ("both", "predicted", "actual")}

    def count(
        self, logits_BHWC: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Counters of one batch from logits; label uint8 [B,H,W], 255 unlabelled."""
        return self.count_classes(class_map(logits_BHWC), label, valid_B)

    def count_classes(
        self, predicted_BHW: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Counters of one batch from class maps (int32 [classes] each)."""
        mask = only_rows(labelled(label, valid_B), self.counted(label))

        def pixels(one: jax.Array) -> State:
            predicted, actual = (predicted_BHW == one) & mask, (label == one) & mask
            sets = {"both": predicted & actual, "predicted": predicted, "actual": actual}
            return {k: jnp.sum(v, dtype=jnp.int32) for k, v in sets.items()}

        # Class after class: no [B,H,W,classes] array of comparisons is ever in memory.
        return jax.lax.map(pixels, jnp.arange(self.classes))

    def per_class(self, state: State) -> np.ndarray:
        """IoU of every class, float64 [classes]; 0 for a class that never appears."""
        both, union = _intersection_and_union(state)
        return both / np.maximum(union, 1e-8)

    def compute(self, state: State) -> Scores:
        """Fractions: mIoU, mIoU_present, mIoU_foreground (NaN for one class), pixel_accuracy."""
        both, union = _intersection_and_union(state)
        labelled_pixels = float(np.sum(state["actual"]))
        if labelled_pixels == 0:
            names = ("mIoU", "mIoU_present", "mIoU_foreground", "pixel_accuracy")
            return dict.fromkeys(names, float("nan"))
        iou = self.per_class(state)
        return {
            "mIoU": float(np.mean(iou)),
            "mIoU_present": float(np.mean(iou[union > 0])),
            "mIoU_foreground": float(np.mean(iou[1:])) if self.classes > 1 else float("nan"),
            "pixel_accuracy": float(np.sum(both)) / labelled_pixels,
        }


def _intersection_and_union(state: State) -> tuple[np.ndarray, np.ndarray]:
    both, predicted, actual = (np.asarray(state[k]) for k in ("both", "predicted", "actual"))
    return both, predicted + actual - both
