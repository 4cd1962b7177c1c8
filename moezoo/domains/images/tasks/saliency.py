"""Saliency: balanced cross-entropy; maximum F-measure and intersection over union by threshold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError
from moezoo.label import BINARY
from moezoo.tasks import output, painting
from moezoo.tasks.base import Metric, Scores, State, Task, leaves_out_marked, ratio
from moezoo.tasks.constant import log_odds
from moezoo.tasks.losses import balanced_binary, balanced_cross_entropy, labelled
from moezoo.tasks.registry import TaskFacts

POOLED = np.arange(1, 20) / 20
PER_IMAGE = np.linspace(0.2, 0.9, 15)
BETA_SQUARED = 0.3
EPSILON = 1e-12


def probability(logits_BHWC: jax.Array) -> jax.Array:
    """Probability of "salient", float32 [B,H,W], from one logit or from two (softmax)."""
    x = logits_BHWC.astype(jnp.float32)
    if x.shape[-1] == 1:
        return jax.nn.sigmoid(x[..., 0])
    return jax.nn.softmax(x, axis=-1)[..., 1]


def to_bytes_range(logits_BHWC: jax.Array) -> jax.Array:
    """The references' output form: 255 * probability, float32 [B,H,W]."""
    return 255.0 * probability(logits_BHWC)


@leaves_out_marked
@dataclass(frozen=True)
class SaliencyScores(Metric):
    """Both protocols of the literature, from the same probabilities.

    `maxF`: counts pooled over the set at 19 thresholds 0.05..0.95, beta^2 = 0.3 (TaskPrompter,
    InvPT, SAK). `maxF_double_sigmoid` is what TaskPrompter and InvPT publish: their evaluator
    passes the probability through a sigmoid once more, so only p >= .20, .41, .62, .85 tell
    anything apart. `mIoU` and `maxF_per_image`: precision, recall and Jaccard index per image at
    15 thresholds 0.2..0.9, averaged over the images, beta = 1 (M3ViT; its reported number is mIoU).
    """

    def init(self) -> State:
        """Pixel counters per pooled threshold; sums over images per per-image threshold."""
        counters = ("hits", "predicted", "hits_twice", "predicted_twice")
        state: State = {k: np.zeros(len(POOLED), np.int64) for k in counters}
        sums = ("jaccard", "precision", "recall")
        state |= {k: np.zeros(len(PER_IMAGE), np.float64) for k in sums}
        return state | {k: np.zeros((), np.int64) for k in ("actual", "images")}

    def count(
        self, logits_BHWC: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Counters of one batch; label uint8 [B,H,W], 1 salient, 255 unlabelled."""
        return self.count_probability(probability(logits_BHWC), label, valid_B)

    def count_probability(
        self, probability_BHW: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Counters of one batch from probabilities in [0, 1]."""
        mask = labelled(label, valid_B)
        truth = (label == 1) & mask
        hits, predicted = _pooled(probability_BHW, truth, mask)
        hits_twice, predicted_twice = _pooled(jax.nn.sigmoid(probability_BHW), truth, mask)
        return {
            "hits": hits,
            "predicted": predicted,
            "hits_twice": hits_twice,
            "predicted_twice": predicted_twice,
            "actual": jnp.sum(truth, dtype=jnp.int32),
        } | _per_image(probability_BHW, truth, mask)

    def compute(self, state: State) -> Scores:
        """Fractions: maxF, maxF_double_sigmoid, mIoU, maxF_per_image."""
        images = state["images"]
        precision, recall = (ratio(state[k], images) for k in ("precision", "recall"))
        return {
            "maxF": _max_f(state["hits"], state["predicted"], state["actual"]),
            "maxF_double_sigmoid": _max_f(
                state["hits_twice"], state["predicted_twice"], state["actual"]
            ),
            "mIoU": float(np.max(ratio(state["jaccard"], images))),
            "maxF_per_image": float(
                np.max(2 * precision * recall / (precision + recall + EPSILON))
            ),
        }


def _pooled(
    scores_BHW: jax.Array, truth: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def at(limit: jax.Array) -> tuple[jax.Array, jax.Array]:
        above = scores_BHW >= limit
        hits = jnp.sum(above & truth, dtype=jnp.int32)
        return hits, jnp.sum(above & mask, dtype=jnp.int32)

    # One threshold at a time: no [B,H,W,thresholds] array is ever in memory.
    return jax.lax.map(at, jnp.asarray(POOLED, jnp.float32))


def _per_image(probability_BHW: jax.Array, truth: jax.Array, mask: jax.Array) -> State:
    seen = jnp.any(mask, axis=(1, 2))
    actual = jnp.sum(truth, axis=(1, 2), dtype=jnp.float32)

    def at(limit: jax.Array) -> State:
        above = (probability_BHW > limit) & mask
        hits = jnp.sum(above & truth, axis=(1, 2), dtype=jnp.float32)
        predicted = jnp.sum(above, axis=(1, 2), dtype=jnp.float32)
        union = predicted + actual - hits
        per_image = {
            "jaccard": jnp.where(union > 0, hits / jnp.maximum(union, 1.0), 1.0),
            "precision": hits / (predicted + EPSILON),
            "recall": hits / (actual + EPSILON),
        }
        return {k: jnp.sum(jnp.where(seen, v, 0.0)) for k, v in per_image.items()}

    sums = jax.lax.map(at, _at_most(PER_IMAGE))
    return sums | {"images": jnp.sum(seen, dtype=jnp.int32)}


def _at_most(limits: np.ndarray) -> np.ndarray:
    """The largest float32 numbers that do not exceed these float64 `limits`.

    A float32 probability is above a limit exactly if it is above such a number: so 51 / 255 counts
    as more than 0.2, as it does where the comparison is made in float64.
    """
    nearest = limits.astype(np.float32)
    return np.where(nearest > limits, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _max_f(hits: np.ndarray, predicted: np.ndarray, actual: np.ndarray) -> float:
    if not actual.any() and not predicted.any():
        return float("nan")
    precision = np.nan_to_num(ratio(hits, predicted))
    recall = np.nan_to_num(ratio(hits, actual))
    f = ratio((1 + BETA_SQUARED) * precision * recall, BETA_SQUARED * precision + recall)
    return float(np.max(np.nan_to_num(f)))


LOSSES: dict[int, Callable[..., jax.Array]] = {1: balanced_binary, 2: balanced_cross_entropy}


def task(channels: int = 1, weight: float = 5.0) -> Task:
    """Labels uint8 [B,H,W], 1 salient, 255 unlabelled.

    One output channel is M3ViT's form (sigmoid), two are TaskPrompter's and InvPT's (softmax).
    Raises UserError for any other number of channels.
    """
    if channels not in LOSSES:
        raise UserError(f"Task 'saliency' has 1 or 2 output channels, not {channels}.")
    return Task(
        name="saliency",
        channels=channels,
        loss=LOSSES[channels],
        metric=SaliencyScores(),
        headline="maxF",
        lower_is_better=False,
        weight=weight,
        postprocess=probability,
        picture=painting.Probability(),
        label=BINARY,
        output=output.PROBABILITY,
        constant=log_odds,
    )


def settings(given: TaskFacts) -> dict[str, Any]:
    """The number of channels that the run's protocol asks for."""
    return {"channels": given.protocol.saliency_channels}
