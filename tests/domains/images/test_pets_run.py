"""The configuration of the pets, two steps on a tiny archive: train, evaluate, report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moezoo.train import config as configs
from moezoo.train.loop import train
from moezoo.train.report import write_report
from tests.domains.images.data import pets


@pytest.mark.slow
def test_pets_from_archive_to_report(tmp_path: Path) -> None:
    root = pets.make_pets(tmp_path / "archive", train=5, test=3)
    given = {
        "data.archive": root,
        "data.data-dir": tmp_path / "data",
        "directory": tmp_path / "runs",
        "train.steps": 2,
        "train.batch": 8,
        "optimiser.warmup": 1,
        "evaluate.batch": 8,
        "evaluate.pictures": 2,
        "checkpoint.every": 2,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    finished = train(configs.load("pets/m3vit_tiny", words))
    write_report(finished)
    scores = finished.evaluation.scores
    assert scores.keys() == {"semseg", "saliency", "edge"}
    assert all(np.isfinite(scores[t.name][t.headline]) for t in finished.setup.tasks)
    report = (finished.directory / "report.md").read_text()
    assert "oxford_iiit_pet, 5 training images and 3 test images at 128x128" in report
    assert (finished.directory / "pictures/predictions.png").is_file()
