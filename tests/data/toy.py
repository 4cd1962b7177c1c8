"""A tfds data set like those of the library: depth and a class map of every image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from moezoo.data.source import Labels
from moezoo.domains.images.data.dense.builder import png
from moezoo.domains.images.data.tfds_source import TfdsMapping
from moezoo.label import CLASSES, DISTANCE


class MappedToy(tfds.core.GeneratorBasedBuilder):
    """A builder like those of the library: depth and a class map of every image."""

    VERSION = tfds.core.Version("2.1.0")
    code_path = None
    fails: Exception | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "rgb": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "metres": tfds.features.Tensor(
                shape=(None, None, 1), dtype=np.float32, encoding="zlib"
            ),
            "kinds": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.fails is not None:
            raise self.fails
        for k in range(10):
            yield (
                k,
                {
                    "rgb": png(np.full((8, 8 + k, 3), k, np.uint8)),
                    "metres": np.full((8, 8 + k, 1), k, np.float32),
                    "kinds": png(np.full((8, 8 + k), k % 3, np.uint8)),
                },
            )


MAPPING = TfdsMapping(
    name="toy",
    dataset="mapped_toy:2.1.0",
    splits={"train": "train[:30%]", "test": "validation"},
    maps=("metres", "kinds"),
    tasks={
        "semseg": lambda record: np.where(record["kinds"] == 2, 255, record["kinds"])[..., 0],
        "depth": lambda record: record["metres"][..., 0],
    },
    kinds={"semseg": CLASSES, "depth": DISTANCE},
    labels={"semseg": Labels(("a", "b"), np.zeros((2, 3), np.uint8))},
    image="rgb",
)
