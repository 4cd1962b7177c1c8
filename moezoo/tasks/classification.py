"""One class for a whole image or clip: softmax cross-entropy, top-1 accuracy.

Used for the kind of a scene, and for all tasks on sounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.label import IMAGE
from moezoo.tasks import output, painting
from moezoo.tasks.base import Metric, Scores, State, Task, leaves_out_marked, ratio
from moezoo.tasks.constant import most_frequent_class
from moezoo.tasks.losses import cross_entropy, labelled
from moezoo.tasks.painting import WordKey
from moezoo.tasks.registry import TaskFacts


def likeliest(logits_BC: jax.Array) -> jax.Array:
    """The most likely class of each row, int32 [B]."""
    return jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)


CONFUSION = "confusion"


@leaves_out_marked
@dataclass(frozen=True)
class Accuracy(Metric):
    """Share of rows whose most likely class is the right one, over all and by class."""

    classes: int

    def init(self) -> State:
        """How often each class (row) was taken for each other class (column)."""
        return {CONFUSION: np.zeros((self.classes, self.classes), np.int64)}

    def count(
        self, logits_BHWC: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Counters of one batch from logits [B, classes]; label uint8 [B], 255 unlabelled."""
        classes = jnp.arange(self.classes)
        is_BC = (label[:, None] == classes) & labelled(label, valid_B)[:, None]
        taken_BC = likeliest(logits_BHWC)[:, None] == classes
        return {CONFUSION: is_BC.astype(jnp.int32).T @ taken_BC.astype(jnp.int32)}

    def compute(self, state: State) -> Scores:
        """Fractions: accuracy, and its mean over the classes that occur."""
        confusion = np.asarray(state[CONFUSION])
        right, rows = confusion.diagonal(), confusion.sum(1)
        occurs = rows > 0
        by_class = ratio(right, rows)[occurs]
        return {
            "accuracy": float(ratio(right.sum(), rows.sum())),
            "mean_class_accuracy": float(by_class.mean()) if occurs.any() else float("nan"),
        }


def whole(
    name: str,
    classes: int,
    weight: float = 1.0,
    names: Sequence[str] = (),
    example: str = "image",
) -> Task:
    """Labels uint8 [B] below `classes`, 255 unlabelled; pictures show the `names`.

    example: what one example is called.
    """
    return Task(
        name=name,
        channels=classes,
        loss=cross_entropy,
        metric=Accuracy(classes),
        headline="accuracy",
        lower_is_better=False,
        weight=weight,
        postprocess=likeliest,
        picture=WordKey(partial(painting.name_tag, names=tuple(names), count=classes)),
        label=IMAGE,
        output=replace(output.LABEL, unit=f"class index of the {example}"),
        constant=most_frequent_class,
    )


def settings(given: TaskFacts) -> dict[str, Any]:
    """The data set's classes."""
    return given.classes() | {"names": given.names}
