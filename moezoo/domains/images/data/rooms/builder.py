"""`rooms` as an ordinary tensorflow-datasets builder (ArrayRecord files, no TensorFlow)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moezoo.data.progress import progress
from moezoo.domains.images import thinning
from moezoo.domains.images.data.rooms.names import CLASSES, PARTS, SCENES
from moezoo.domains.images.data.rooms.workers import Job, render_all

PICTURES = ("image", "semseg", "parts", "edge", "saliency")


def fingerprint() -> str:
    """Eight hex digits of the generator's sources, so that a changed generator makes new data."""
    digest = hashlib.sha256()
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(thinning.__file__)]:
        if path.name not in ("builder.py", "reader.py", "store.py", "workers.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


@dataclass
class RoomsConfig(tfds.core.BuilderConfig):
    """Resolution, number of scenes and seed; the name states them and the generator's version."""

    name: str = ""
    height: int = 64
    width: int = 64
    train: int = 2000
    test: int = 400
    seed: int = 0

    def __post_init__(self) -> None:
        self.name = (
            f"{self.height}x{self.width}_train{self.train}_test{self.test}"
            f"_seed{self.seed}_{fingerprint()}"
        )


class Rooms(tfds.core.GeneratorBasedBuilder):
    """Ray-cast indoor scenes with exact labels.

    depth: float32 metres along the optical axis. normals: float32 unit vectors in the camera frame
    (x right, y up, z towards the viewer). edge, saliency: 0/1. parts: 0 is no part. No void pixels.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # else tfds 4.9.10 looks for checksums with a package it does not install
    builder_config: RoomsConfig

    def __init__(self, **more: Any):
        self.running = ExitStack()  # stops the rendering processes if writing ends early
        super().__init__(**more)

    def _info(self) -> tfds.core.DatasetInfo:
        size = (self.builder_config.height, self.builder_config.width)
        features: dict[str, Any] = {
            name: tfds.features.Image(
                shape=(*size, 3 if name == "image" else 1), encoding_format="png"
            )
            for name in PICTURES
        }
        raw = tfds.features.Encoding.BYTES
        features |= {
            "depth": tfds.features.Tensor(shape=size, dtype=np.float32, encoding=raw),
            "normals": tfds.features.Tensor(shape=(*size, 3), dtype=np.float32, encoding=raw),
            "intrinsics": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            "caption": tfds.features.Text(),
            "scene": tfds.features.ClassLabel(names=list(SCENES)),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__ or "",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(classes=list(CLASSES), parts=list(PARTS)),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {
            "train": self._generate_examples("train", self.builder_config.train),
            "test": self._generate_examples("test", self.builder_config.test),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        c = self.builder_config
        job = Job(c.seed, split, c.height, c.width, count)
        with progress(f"rendering rooms, {split}", "scenes") as bar:
            task = bar.add_task(split, total=count)
            records = render_all(job)
            self.running.callback(records.close)
            for index, item in enumerate(records):
                pictures = {name: BytesIO(item[name]) for name in PICTURES}
                yield index, item | pictures
                bar.advance(task)
