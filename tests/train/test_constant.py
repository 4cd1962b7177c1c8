"""The best constants are scored on images of several sizes as a model is."""

from __future__ import annotations

import numpy as np

from moezoo.data.source import Info, Labels, SourceExample
from moezoo.domains.images.data import batches
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.train import constant
from tests.tasks.tables import build


class Growing:
    """Images of 8x8, 9x9, ...: class 1 and depth 2 m, class 2 and 4 m in their last row."""

    info = Info(
        "growing", "train", (16, 16), ("semseg", "depth"),
        {"semseg": Labels(("a", "b", "c"), np.zeros((3, 3), np.uint8))}, kinds=KINDS,
    )  # fmt: skip

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> SourceExample:
        size = (8 + index, 8 + index)
        semseg, depth = np.ones(size, np.uint8), np.full(size, 2.0, np.float32)
        semseg[-1], depth[-1] = 2, 4.0
        return {"image": np.zeros((*size, 3), np.uint8), "semseg": semseg, "depth": depth}


def test_images_of_several_sizes() -> None:
    tasks = [build("semseg", classes=3), build("depth")]
    found = constant.scores(tasks, Growing(), Growing(), batches.evaluation)
    sides = np.arange(8, 13)
    last, pixels = sides.sum(), (sides**2).sum()
    share = last / pixels
    assert np.isclose(found["semseg"]["pixel_accuracy"], 1 - share)
    assert np.isclose(found["depth"]["rmse"], 2 * np.sqrt(share * (1 - share)), rtol=1e-5)
