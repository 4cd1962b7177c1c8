"""Semantic segmentation: softmax cross-entropy, mean intersection over union."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from moezoo.domains.images.tasks.iou import IoU, class_map
from moezoo.label import CLASSES
from moezoo.tasks import output, painting
from moezoo.tasks.base import Task
from moezoo.tasks.constant import most_frequent_class
from moezoo.tasks.losses import class_balanced_cross_entropy, cross_entropy


def task(
    classes: int,
    weight: float = 1.0,
    class_balance: float = 0.0,
    names: Sequence[str] = (),
    colours: np.ndarray | None = None,
) -> Task:
    """Labels uint8 [B,H,W] below `classes`, 255 unlabelled (21 in PASCAL-Context, 40 in NYUD).

    class_balance: exponent of `class_balanced_cross_entropy`. names, colours: for pictures, uint8
    [classes,3].
    """
    balanced = partial(class_balanced_cross_entropy, exponent=class_balance)
    loss = balanced if class_balance else cross_entropy
    return Task(
        name="semseg",
        channels=classes,
        loss=loss,
        metric=IoU(classes),
        headline="mIoU",
        lower_is_better=False,
        weight=weight,
        postprocess=class_map,
        picture=painting.ClassColours(classes, tuple(names), colours),
        label=CLASSES,
        output=output.CLASSES,
        constant=most_frequent_class,
    )
