"""Whole runs on a tiny source: files, resuming, stopping, disagreeing configurations."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.domains.images import domain as data_config
from moezoo.domains.images.domain import DataConfig
from moezoo.errors import UserError
from moezoo.nn.module import flatten
from moezoo.train import loop, optim, restore, scoring
from moezoo.train.config import CheckpointConfig, EvaluateConfig, OptimConfig, TrainConfig
from moezoo.train.console import Console
from moezoo.train.log import read
from moezoo.train.report import write_report
from moezoo.train.resume import continued
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
    write_report(finished)
    patch.undo()
    return folder / "tiny", arrays(finished), untimed(folder / "tiny")


def untimed(folder: Path) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k != "timing"} for row in read(folder / "metrics.jsonl")
    ]


def test_a_run_leaves_everything(whole: tuple) -> None:
    folder, _, rows = whole
    pictures = ("pictures/predictions.png", "pictures/curves.png")
    for name in ("report.md", "index.html", "config.json", *pictures):
        assert (folder / name).stat().st_size > 100, name
    assert (folder / "index.html").read_text().count('src="data:image/png') >= len(pictures)
    assert [row["step"] for row in rows if row["split"] == "train"] == [2, 4, 6]
    assert [row["step"] for row in rows if row["split"] == "test"] == [6]
    report = (folder / "report.md").read_text()
    assert "| semseg | mIoU" in report and "best constant" in report


@pytest.mark.slow
def test_the_learning_rate_is_logged_and_the_sum_of_losses_explained(whole: tuple) -> None:
    folder, rate = whole[0], optim.schedule(OptimConfig(lr=1e-2), 6)
    rows = [row for row in read(folder / "metrics.jsonl") if row["split"] == "train"]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["learning_rate"] for row in rows] == [float(rate(at)) for at in (1, 3, 5)]
    report = (folder / "report.md").read_text()
    assert "loss/total" in report and "1 x depth + 0.01 x balance loss importance" in report


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
    config, explicit = continued(tmp_path / "tiny", ["--evaluate.pictures", "0"])
    finished = loop.train(config, explicit=explicit)
    for path, value in arrays(finished).items():
        np.testing.assert_array_equal(value, whole[1][path], err_msg=path)
    assert untimed(tmp_path / "tiny") == whole[2]


@pytest.mark.slow
def test_a_finished_run_gets_more_steps_and_another_rate(whole: tuple, tmp_path: Path) -> None:
    """Also a clipped gradient, which has another place in the optimiser's state."""
    shutil.copytree(whole[0], tmp_path / "tiny")
    words = ["--train.steps", "8", "--optimiser.lr", "0.001", "--optimiser.clip", "1"]
    config, explicit = continued(tmp_path / "tiny", words)
    said: list[str] = []
    console = Console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console, "say", said.append)
        finished = loop.train(config, console, explicit)
    assert int(finished.state["step"]) == 8
    assert "From step 6 on optimiser.lr is 0.001, before it was 0.01." in said
    assert any("cosine schedule" in line for line in said)
    write_report(finished)
    report = (tmp_path / "tiny/report.md").read_text()
    assert "optimiser.clip None to 1.0 after step 6" in report
    assert "train.steps 6 to 8 after step 6" in report
    with pytest.raises(UserError, match="trained for 8 steps already; train.steps is 7"):
        config, explicit = continued(tmp_path / "tiny", ["--train.steps", "7"])
        loop.train(config, explicit=explicit)
    changes = (tmp_path / "tiny/changes.json").read_text()
    with pytest.raises(UserError, match="all of its 8 steps, so optimiser.lr would change nothing"):
        config, explicit = continued(tmp_path / "tiny", ["--optimiser.lr", "0.1"])
        loop.train(config, explicit=explicit)
    assert (tmp_path / "tiny/changes.json").read_text() == changes


def test_another_configuration_does_not_continue(whole: tuple) -> None:
    config = configured(whole[0].parent)
    with pytest.raises(UserError, match="optimiser.lr = 0.01, not 0.5"):
        loop.train(replace(config, optimiser=OptimConfig(lr=0.5)))


def spoiled(step: int) -> Any:
    """`loop.placed` with one NaN in the images of a step."""
    original = loop.placed

    def placed(*given: Any) -> Any:
        for at, batch in enumerate(original(*given), 1):
            yield batch | {"image": batch["image"] * np.nan} if at == step else batch

    return placed


def signalled(step: int) -> Any:
    """`spoiled(step)`, and a SIGTERM after that step."""
    inner = spoiled(step)

    def placed(*given: Any) -> Any:
        for at, batch in enumerate(inner(*given), 1):
            if at == step + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return placed


HUGE = {"optimiser": OptimConfig(kind="sgd", lr=1e30)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("placed", "changes", "says", "kept"),
    [
        (None, HUGE, "params/.* not finite after step 1: lower optimiser.lr", []),
        (spoiled(6), {}, "The loss is nan at step 6: .*checkpoint 5 is sound", ["4", "5"]),
        (signalled(2), {}, "The loss is nan at step 2: ", ["1"]),
    ],
)
def test_what_is_not_finite_is_never_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    placed: Any,
    changes: dict,
    says: str,
    kept: list[str],
) -> None:
    """Whatever makes it, at a step, at a signal or at the end: older checkpoints stay."""
    config = configured(tmp_path, checkpoint=CheckpointConfig(every=1), **changes)
    if placed is not None:
        monkeypatch.setattr(loop, "placed", placed)
    # Nothing is skipped here: the first step that is not finite ends the run.
    ends = replace(config.train, log_every=100, nonfinite_steps=0)
    with pytest.raises(UserError, match=says) as error:
        loop.train(replace(config, train=ends))
    assert f"train.py --resume {tmp_path / 'tiny'} --optimiser.lr" in str(error.value)
    assert sorted(p.name for p in (tmp_path / "tiny/checkpoints").iterdir()) == kept
    assert not (tmp_path / "tiny/report.md").exists()


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on and says so; all of its parameters are finite."""
    said: list[str] = []
    console = Console()
    monkeypatch.setattr(loop, "placed", spoiled(3))
    monkeypatch.setattr(console, "say", said.append)
    finished = loop.train(configured(tmp_path), console)
    assert int(finished.state["step"]) == 6
    assert all(np.isfinite(value).all() for value in arrays(finished).values())
    (line,) = [line for line in said if "changed nothing" in line]
    assert line.startswith("Step 3 changed nothing: its loss, gradient or update is not finite")
    rows = [row for row in read(tmp_path / "tiny/metrics.jsonl") if row["split"] == "train"]
    assert [row["timing"]["skipped_steps"] for row in rows][-1] == 1
    spent = json.loads((tmp_path / "tiny/wall_time.json").read_text())
    assert spent["step"] == 6 and 0 < spent["goodput"] < 1


@pytest.mark.slow
def test_a_run_of_skipped_steps_ends(tmp_path: Path) -> None:
    # What was saved on the way is the state that the run began with, which is sound.
    with pytest.raises(UserError, match="Steps 1 to 6 changed nothing, .*checkpoint 4 is sound"):
        loop.train(configured(tmp_path, **HUGE))
    assert not (tmp_path / "tiny/report.md").exists()


@pytest.mark.slow
def test_an_older_versions_nan_is_passed_over(whole: tuple, tmp_path: Path) -> None:
    """A sealed checkpoint that is not finite is no place to go on from."""
    shutil.copytree(whole[0], tmp_path / "tiny")
    said: list[str] = []
    console = Console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "not_finite", lambda state: ["params/x"] * (int(state["step"]) == 6))
        patch.setattr(console, "say", said.append)
        finished = loop.train(configured(tmp_path), console)
    assert any("Skipping checkpoint" in line and "params/x is not finite" in line for line in said)
    assert any(line.endswith("from step 4.") for line in said)
    for path, value in arrays(finished).items():
        np.testing.assert_array_equal(value, whole[1][path], err_msg=path)


@pytest.mark.slow
def test_a_run_of_damaged_checkpoints_begins_again_only_where_that_is_said(
    whole: tuple, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "tiny")
    for held in (folder / "checkpoints").glob("*/manifest.json"):
        held.write_text("{")
    with pytest.raises(UserError, match="can be read, all [0-9] are damaged"):
        restore.find(folder)
    config, _ = continued(folder, [])
    with pytest.raises(UserError, match="cannot go on: .* add --checkpoint.resume auto"):
        loop.train(config)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(UserError, match="tiny has trained but has no checkpoint"):
        loop.train(config)
    config, _ = continued(folder, ["--checkpoint.resume", "auto"])
    for path, value in arrays(loop.train(config)).items():
        np.testing.assert_array_equal(value, whole[1][path], err_msg=path)


@pytest.mark.slow
def test_ctrl_c_during_the_last_evaluation_is_heard(
    whole: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole[0], tmp_path / "tiny")
    original, batches = scoring.placed, 0

    def placed(*given: Any) -> Any:
        nonlocal batches
        for batch in original(*given):
            batches += 1
            os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(scoring, "placed", placed)
    with pytest.raises(loop.Interrupted, match="after step 6, the last, before its report"):
        loop.train(configured(tmp_path))
    assert batches == 1, "of two"


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


def test_data_that_end_before_the_run_does_are_told() -> None:
    assert list(loop.batches_of(iter([(2, "a"), (3, "b")]), 2, 4)) == ["a", "b"]
    assert list(loop.batches_of(iter([]), 4, 4)) == []
    for given, done in (([(2, "a")], 3), ([], 2)):
        with pytest.raises(UserError, match=f"ended after {done} of 4 steps"):
            list(loop.batches_of(iter(given), 2, 4))
