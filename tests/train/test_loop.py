"""Whole runs on a tiny source: files, resuming, stopping, disagreeing configurations."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.data import config as data_config
from moezoo.data.config import DataConfig
from moezoo.errors import UserError
from moezoo.nn.module import flatten
from moezoo.train import loop, outcome
from moezoo.train.config import EvaluateConfig, OptimConfig, TrainConfig
from moezoo.train.log import read
from moezoo.train.scoring import score_run
from moezoo.train.setup import load_run
from tests.train import tiny


@pytest.fixture(autouse=True)
def tiny_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set `tiny` in place of rooms."""
    opener = lambda config, split: tiny.source(12 if split == "train" else 10, split)  # noqa: E731
    monkeypatch.setitem(data_config._OPENERS, "tiny", opener)


def configured(directory: Path, **changes: Any) -> Any:
    config = tiny.config(str(directory), model=tiny.dense(), **changes)
    return replace(config, data=DataConfig(name="tiny", resolution=tiny.SIZE, augment=("flip",)))


def arrays(finished: loop.Finished) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flatten(finished.state["params"]).items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[dict]]:
    """An uninterrupted run: its folder, final parameters, metrics without timing."""
    folder = tmp_path_factory.mktemp("whole")
    patch = pytest.MonkeyPatch()
    patch.setitem(
        data_config._OPENERS, "tiny", lambda c, s: tiny.source(12 if s == "train" else 10, s)
    )
    finished = loop.train(configured(folder))
    outcome.write_outcome(finished)
    patch.undo()
    return folder / "tiny", arrays(finished), untimed(folder / "tiny")


def untimed(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k != "timing"} for row in read(folder / "metrics.jsonl")
    ]


def test_a_run_leaves_everything(whole: tuple) -> None:
    folder, _, rows = whole
    for name in ("report.md", "config.json", "pictures/predictions.png", "pictures/curves.png"):
        assert (folder / name).stat().st_size > 100, name
    assert [row["step"] for row in rows if row["split"] == "train"] == [2, 4, 6]
    assert [row["step"] for row in rows if row["split"] == "test"] == [6]
    report = (folder / "report.md").read_text()
    assert "| semseg | mIoU" in report and "best constant" in report


@pytest.mark.slow
def test_resumed_equals_uninterrupted(whole: tuple, tmp_path: Path) -> None:
    """Interrupted by SIGTERM in the middle, continued by the same command: bit for bit equal."""
    config = configured(tmp_path)
    original, count = loop.Trainer.log, 0

    def log_and_signal(self: loop.Trainer, at: int, *rest: Any) -> float:
        nonlocal count
        count += 1
        if count == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, at, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "log", log_and_signal)
        with pytest.raises(loop.Interrupted, match="Stopped after step"):
            loop.train(config)
    finished = loop.train(config)
    for path, value in arrays(finished).items():
        np.testing.assert_array_equal(value, whole[1][path], err_msg=path)
    assert untimed(tmp_path / "tiny") == whole[2]


def test_another_configuration_does_not_continue(whole: tuple) -> None:
    config = configured(whole[0].parent)
    with pytest.raises(UserError, match="optimiser.lr = 0.01, not 0.5"):
        loop.train(replace(config, optimiser=OptimConfig(lr=0.5)))


@pytest.mark.slow
def test_a_loss_that_explodes_ends_with_a_sentence(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with pytest.raises(UserError, match="optimiser.lr"):
        loop.train(replace(config, optimiser=OptimConfig(kind="sgd", lr=1e30)))


@pytest.mark.slow
def test_evaluations_during_the_run_rank_checkpoints(tmp_path: Path) -> None:
    config = configured(
        tmp_path,
        train=TrainConfig(steps=4, batch=8, log_every=1),
        evaluate=EvaluateConfig(every=2, examples=8, pictures=0),
    )
    loop.train(config)
    manifest = json.loads((tmp_path / "tiny/checkpoints/2/manifest.json").read_text())
    assert manifest["score"] == 0.0  # the first evaluation is its own baseline
    assert not (tmp_path / "tiny/pictures/usage.png").exists()


def test_scores_and_model_of_a_run(whole: tuple) -> None:
    folder, parameters, rows = whole
    result = score_run(folder)
    logged = next(row for row in rows if row["split"] == "test")
    assert result.scores["depth"]["rmse"] == pytest.approx(logged["depth/rmse"], rel=1e-5)
    loaded = load_run(folder)
    assert loaded.step == 6 and [t.name for t in loaded.tasks] == ["semseg", "depth"]


def test_read_only_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match="file"):
        loop.train(configured(blocked))
