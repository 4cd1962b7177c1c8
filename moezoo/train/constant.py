"""The best constant predictor per task: what a model has to beat to have learnt anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.data import pipeline
from moezoo.data.source import First, Source
from moezoo.tasks.base import Task, merge
from moezoo.tasks.registry import SOUND

Labels = Iterable[np.ndarray]


def _most_frequent_class(labels: Labels, channels: int) -> np.ndarray:
    counts = sum(np.bincount(label.ravel(), minlength=256) for label in labels)
    # 255 marks unlabelled pixels in every class map of the zoo.
    best = int(np.argmax(np.asarray(counts)[: min(channels, 255)]))
    return np.eye(channels, dtype=np.float32)[best] * 20.0


def _mean_depth(labels: Labels, channels: int) -> np.ndarray:
    total, pixels = 0.0, 0
    for label in labels:
        total += float(label[label > 0].sum(dtype=np.float64))
        pixels += int((label > 0).sum())
    return np.full(channels, total / max(pixels, 1), np.float32)


def _mean_direction(labels: Labels, channels: int) -> np.ndarray:
    total = sum(label.reshape(-1, channels).sum(0, dtype=np.float64) for label in labels)
    return np.asarray(total / max(float(np.linalg.norm(total)), 1e-12), np.float32)


def _frequency(labels: Labels, channels: int) -> np.ndarray:
    counts = np.asarray(sum(np.bincount(label.ravel(), minlength=256)[:2] for label in labels))
    share = (counts[1] + 1.0) / (counts.sum() + 2.0)
    return np.full(channels, np.log(share / (1.0 - share)), np.float32)


CONSTANTS: dict[str, Callable[[Labels, int], np.ndarray]] = {
    "semseg": _most_frequent_class,
    "parts": _most_frequent_class,
    "depth": _mean_depth,
    "normals": _mean_direction,
    "saliency": _frequency,
    "scene": _most_frequent_class,
    **dict.fromkeys(SOUND, _most_frequent_class),
}
Batches = Callable[[Source, int, Sequence[str]], Iterable[Mapping[str, Any]]]


def scores(
    tasks: Sequence[Task],
    train: Source,
    test: Source,
    most: int = 400,
    batches: Batches = pipeline.evaluation,
) -> dict[str, dict[str, float]]:
    """Scores on `test` of the constant that `train` labels suggest, per task that has one.

    Mode of the classes, mean depth, mean direction, log-odds of saliency; edges have no sensible
    constant. At most `most` examples of each set are read, those of `test` in `batches` (source,
    size, names).
    """
    fit, held = First(train, most), First(test, most)
    size = min(50, len(held))
    found = {}
    for task in tasks:
        if task.name not in CONSTANTS:
            continue
        labels = (fit[i][task.name] for i in range(len(fit)))
        logits_C = CONSTANTS[task.name](labels, task.channels)
        total = task.metric.init()
        count = task.metric.count if task.metric.on_host else jax.jit(task.metric.count)
        for batch in batches(held, size, (task.truth,)):
            label = batch[task.truth]
            logits = np.broadcast_to(logits_C, (*label.shape[:3], task.channels))
            counted = count(jnp.asarray(logits), jnp.asarray(label), batch["valid"])
            total = merge(total, counted)
        found[task.name] = task.metric.compute(total)
    return found
