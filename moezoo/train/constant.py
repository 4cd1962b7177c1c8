"""Scores of the best constant predictor per task: what a model has to beat."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.data.source import First, Source
from moezoo.tasks.base import Task, merge

Batches = Callable[[Source, int, Sequence[str]], Iterable[Mapping[str, Any]]]


def scores(
    tasks: Sequence[Task], train: Source, test: Source, batches: Batches, most: int = 400
) -> dict[str, dict[str, float]]:
    """Scores on `test` of the constant that `train` labels suggest, per task that has one.

    At most `most` examples of each set are read, those of `test` in `batches` (source, size,
    names).
    """
    found = {}
    for task in tasks:
        if task.constant is None:
            continue
        fit, held = First(train, most), First(test, most)
        labels = (fit[i][task.name] for i in range(len(fit)))
        logits_C = task.constant(labels, task.channels)
        total = task.metric.init()
        count = task.metric.count if task.metric.on_host else jax.jit(task.metric.count)
        for batch in batches(held, min(50, len(held)), (task.truth,)):
            label = batch[task.truth]
            logits = np.broadcast_to(logits_C, (*label.shape[:3], task.channels))
            counted = count(jnp.asarray(logits), jnp.asarray(label), batch["valid"])
            total = merge(total, counted)
        found[task.name] = task.metric.compute(total)
    return found
