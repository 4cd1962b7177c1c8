"""The best constant prediction: what a model has to beat to have learned anything.

A task names its own function of all training labels and of its number of channels; it gives the
logits float32 [channels] that are the best constants.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from moezoo.tasks.base import mark_of

LabelArrays = Iterable[np.ndarray]


def most_frequent_class(labels: LabelArrays, channels: int) -> np.ndarray:
    """The class that most pixels or examples have, by a wide margin."""
    counts = np.zeros(channels, np.int64)
    for label in labels:
        known = label[label != mark_of(label.dtype)]
        counts += np.bincount(known.ravel(), minlength=channels)[:channels]
    return np.eye(channels, dtype=np.float32)[int(np.argmax(counts))] * 20.0


def log_odds(labels: LabelArrays, channels: int) -> np.ndarray:
    """The share of ones among zeros and ones, as the logit whose sigmoid is that share."""
    counts = np.asarray(sum(np.bincount(label.ravel(), minlength=256)[:2] for label in labels))
    share = (counts[1] + 1.0) / (counts.sum() + 2.0)
    return np.full(channels, np.log(share / (1.0 - share)), np.float32)
