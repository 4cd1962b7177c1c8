"""How tasks on images are exported: a photo in, resized and normalised; a map or a class out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moezoo.data import picture
from moezoo.data.source import Source
from moezoo.deploy import splits
from moezoo.deploy.exporter import Subject
from moezoo.deploy.input_spec import InputSpec
from moezoo.domains.images import runtime
from moezoo.domains.images.data import transforms
from moezoo.domains.images.data.batches import collate
from moezoo.train.config import Config
from moezoo.train.domain import Classes
from moezoo.train.setup import Loaded


def photos(size: tuple[int, int]) -> InputSpec:
    """Normalised RGB images [height, width, 3] of a fixed size, made from photos of any size."""
    return InputSpec(
        name="image",
        unit="images",
        shape=(*size, 3),
        layout="NHWC",
        words={"colour": "RGB"},
        preprocess=tuple(steps(size)),
        postprocess="already applied in `prediction`; resize it to the photo to show it",
        files={"photo.py": runtime, "picture.py": picture},
    )


def steps(size: tuple[int, int]) -> list[dict[str, Any]]:
    """How a photo is prepared, in a manifest's terms: the size and the scale of training."""
    height, width = size
    mean, std = ([float(value) for value in of] for of in (transforms.MEAN, transforms.STD))
    return [
        {"step": "resize", "height": height, "width": width, "mode": "bilinear", "antialias": True},
        {"step": "scale", "factor": 1 / 255},
        {"step": "normalise", "mean": mean, "std": std},
    ]


@dataclass(frozen=True)
class PhotoExports:
    """A run whose paths read images (`deploy.exporter.Exporter`). data: their data section."""

    config: Config
    data: Any

    @property
    def input(self) -> InputSpec:
        return photos(self.data.resolution)

    def check(self, task: str | None) -> None:
        """Every task can be exported."""

    def open(self, split: str) -> Source:
        return self.data.domain.open(self.config, split)

    def identity(self) -> Mapping[str, Any]:
        return splits.identity(self.data)

    stack = staticmethod(collate)

    def subject(self, run: Loaded, classes: Classes) -> Subject:
        return Subject(run.model, {task.name: task for task in run.tasks})

    def picture(self, example: np.ndarray) -> np.ndarray:
        return transforms.denormalise(example)
