"""How tasks on images are exported: a photo in, resized and normalised; a map or a class out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moezoo.data import picture, pipeline
from moezoo.data.source import Source
from moezoo.deploy import splits
from moezoo.deploy.exporter import Subject
from moezoo.deploy.input_spec import InputSpec
from moezoo.domains.images import runtime
from moezoo.domains.images.data import config as data_config
from moezoo.domains.images.data import transforms
from moezoo.domains.images.data.config import DataConfig
from moezoo.train.config import Config
from moezoo.train.setup import Loaded


def photos(size: tuple[int, int]) -> InputSpec:
    """Normalised RGB images [height, width, 3] of a fixed size, made of photos of any."""
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
    """What becomes of a photo, as a manifest says it: the size and the scale of training."""
    height, width = size
    mean, std = ([float(value) for value in of] for of in (transforms.MEAN, transforms.STD))
    return [
        {"step": "resize", "height": height, "width": width, "mode": "bilinear", "antialias": True},
        {"step": "scale", "factor": 1 / 255},
        {"step": "normalise", "mean": mean, "std": std},
    ]


@dataclass(frozen=True)
class PhotoExports:
    """A run whose paths read images (`deploy.exporter.Exporter`). data: what it trained on."""

    config: Config
    data: DataConfig

    @property
    def input(self) -> InputSpec:
        return photos(self.data.resolution)

    def check(self, task: str | None, *, fewer: bool) -> None:
        """Every task can be had, and experts leave wherever there are some."""

    def open(self, split: str) -> Source:
        return data_config.open_source(self.data, split)

    def identity(self) -> Mapping[str, Any]:
        return splits.identity(self.data)

    stack = staticmethod(pipeline.collate)

    def subject(self, run: Loaded, source: Source) -> Subject:
        return Subject(run.model, {task.name: task for task in run.tasks})

    def picture(self, example: np.ndarray) -> np.ndarray:
        return transforms.denormalise(example)
