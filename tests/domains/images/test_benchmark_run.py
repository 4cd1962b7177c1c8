"""A short run on an archive whose images all have their own size: train, evaluate, report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moezoo.domains.images.data.dense.pascal import LAYOUT
from moezoo.domains.images.domain import DataConfig
from moezoo.train.loop import train
from moezoo.train.report import write_report
from tests.domains.images.data import archives
from tests.train import tiny


@pytest.mark.slow
@pytest.mark.claims
def test_pascal_from_archive_to_report(tmp_path: Path) -> None:
    root = archives.make_pascal(tmp_path, train=5, test=3, sides=(16, 32))
    data = DataConfig(
        name="pascal",
        resolution=(32, 32),
        archive=str(root),
        data_dir=str(tmp_path / "data"),
        augment=("scale", "crop", "flip", "distort"),
    )
    config = tiny.config(str(tmp_path / "runs"), tasks=LAYOUT.tasks, data=data)
    finished = train(config)
    write_report(finished)
    scores = finished.evaluation.scores
    assert scores.keys() == set(LAYOUT.tasks)
    assert all(np.isfinite(scores[t.name][t.headline]) for t in finished.setup.tasks)
    report = (finished.directory / "report.md").read_text()
    assert "pascal, 5 training images and 3 test images at 32x32" in report
    assert (finished.directory / "pictures/predictions.png").is_file()
