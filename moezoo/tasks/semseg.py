"""Semantic segmentation: softmax cross-entropy, mean intersection over union."""

from __future__ import annotations

from functools import partial

from moezoo.tasks import pictures
from moezoo.tasks.base import Task
from moezoo.tasks.iou import IoU, class_map
from moezoo.tasks.losses import cross_entropy


def task(classes: int, weight: float = 1.0) -> Task:
    """Labels uint8 [B,H,W] below `classes`, 255 unlabelled (21 in PASCAL-Context, 40 in NYUD)."""
    return Task(
        name="semseg",
        channels=classes,
        loss=cross_entropy,
        metric=IoU(classes),
        headline="mIoU",
        lower_is_better=False,
        weight=weight,
        postprocess=class_map,
        picture=partial(pictures.classes, count=classes),
    )
