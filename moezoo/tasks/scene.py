"""Kind of scene, one per image: softmax cross-entropy, top-1 accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.tasks import pictures
from moezoo.tasks.base import Metric, Scores, State, Task, ratio
from moezoo.tasks.losses import cross_entropy, labelled


def likeliest(logits_BC: jax.Array) -> jax.Array:
    """The most likely class of each image, int32 [B]."""
    return jnp.argmax(logits_BC, axis=-1).astype(jnp.int32)


@dataclass(frozen=True)
class Accuracy(Metric):
    """Share of images whose most likely class is the right one, over all and by class."""

    classes: int

    def init(self) -> State:
        """Images of each class, and those of them that were recognised."""
        return {name: np.zeros(self.classes, np.int64) for name in ("right", "images")}

    def count(
        self, logits_BHWC: jax.Array, label: jax.Array, valid_B: jax.Array | None = None
    ) -> State:
        """Counters of one batch from logits [B, classes]; label uint8 [B], 255 unlabelled."""
        classes = jnp.arange(self.classes)
        is_BC = (label[:, None] == classes) & labelled(label, valid_B)[:, None]
        right_BC = is_BC & (likeliest(logits_BHWC)[:, None] == classes)
        sets = {"right": right_BC, "images": is_BC}
        return {name: jnp.sum(v, axis=0, dtype=jnp.int32) for name, v in sets.items()}

    def compute(self, state: State) -> Scores:
        """Fractions: accuracy, and its mean over the classes that occur."""
        right, images = state["right"], state["images"]
        occurs = images > 0
        by_class = ratio(right, images)[occurs]
        return {
            "accuracy": float(ratio(right.sum(), images.sum())),
            "mean_class_accuracy": float(by_class.mean()) if occurs.any() else float("nan"),
        }


def task(classes: int, weight: float = 1.0, names: Sequence[str] = ()) -> Task:
    """Labels uint8 [B] below `classes`, 255 unlabelled; pictures show the `names`."""
    return Task(
        name="scene",
        channels=classes,
        loss=cross_entropy,
        metric=Accuracy(classes),
        headline="accuracy",
        lower_is_better=False,
        weight=weight,
        postprocess=likeliest,
        picture=partial(pictures.name_tag, names=tuple(names), count=classes),
        per_pixel=False,
    )
