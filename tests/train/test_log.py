"""metrics.jsonl over interruptions, TensorBoard and W&B as options."""

from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest

from moezoo.errors import UserError
from moezoo.train import log


def write(path, steps, resumed=0):
    file = log.MetricsFile(path, resumed)
    for step in steps:
        file.write(step, "train", {"loss/total": 1 / step}, {"seconds": 0.1})
        if step % 4 == 0:
            file.write(step, "test", {"depth/rmse": 0.3}, {})
    return file


def test_lines_are_plain_json(tmp_path):
    write(tmp_path / "m.jsonl", [2, 4]).close()
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    first = {"step": 2, "split": "train", "loss/total": 0.5, "timing": {"seconds": 0.1}}
    assert lines[0] == first
    assert [(line["step"], line["split"]) for line in lines] == [
        (2, "train"), (4, "train"), (4, "test"),
    ]  # fmt: skip
    assert log.read(tmp_path / "m.jsonl") == lines


@pytest.mark.parametrize("killed_at, resumed", [(9, 8), (7, 4), (3, 2), (12, 12)])
@pytest.mark.parametrize("half", ["", '{"step": 9, "spl', "\x00\x00"])
def test_resumed_file_equals_the_uninterrupted(tmp_path, killed_at, resumed, half):
    write(tmp_path / "whole", range(1, 13)).close()
    write(tmp_path / "killed", range(1, killed_at + 1)).close()
    with open(tmp_path / "killed", "a") as file:
        file.write(half)
    write(tmp_path / "killed", range(resumed + 1, 13), resumed).close()
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_new_run_begins_a_new_file(tmp_path):
    write(tmp_path / "m", [1, 2]).close()
    write(tmp_path / "m", [1]).close()
    assert [line["step"] for line in log.read(tmp_path / "m")] == [1]


def test_every_line_is_on_disk_at_once(tmp_path):
    write(tmp_path / "m", [1, 2])
    assert len(log.read(tmp_path / "m")) == 2


def test_values_without_json_word_are_null(tmp_path):
    file = log.MetricsFile(tmp_path / "m")
    file.write(1, "train", {"a": math.nan, "b": math.inf, "c": 2}, {})
    assert log.read(tmp_path / "m")[0]["a"] is log.read(tmp_path / "m")[0]["b"] is None
    assert log.read(tmp_path / "m")[0]["c"] == 2


def test_missing_file_has_no_lines(tmp_path):
    assert log.read(tmp_path / "none") == []


def test_unwritable_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not"):
        log.MetricsFile(tmp_path / "file" / "m.jsonl")


def test_full_disk_is_a_user_error(tmp_path):
    file = log.MetricsFile(tmp_path / "m")
    file._lines = log.DiskLines(Path("/dev/full"))
    with pytest.raises(UserError, match="No space left"):
        file.write(1, "train", {}, {})


class Writer:
    """Stands in for tensorboardX.SummaryWriter."""

    made: list[Writer] = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.closed = True


def test_tensorboard_gets_every_scalar(tmp_path, monkeypatch):
    module = ModuleType("tensorboardX")
    module.SummaryWriter = Writer
    module.__spec__ = ModuleSpec("tensorboardX", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with log.open_sinks(tmp_path, "on", resumed=6) as sinks:
        sinks.write(7, "train", {"loss": 2.0}, {"seconds": 0.5})
    writer = Writer.made[-1]
    assert writer.scalars == [("train/loss", 2.0, 7), ("train/seconds", 0.5, 7)]
    assert writer.purge_step == 7 and writer.closed
    assert [line["step"] for line in log.read(tmp_path / "metrics.jsonl")] == [7]


def test_forced_tensorboard_without_the_extra_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"moezoo\[tensorboard\]"):
        log.open_sinks(tmp_path, "on")


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_without_the_extra_the_file_alone_is_written(tmp_path, monkeypatch, choice):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with log.open_sinks(tmp_path, choice) as sinks:
        sinks.write(1, "train", {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with log.open_sinks(tmp_path) as sinks:
        sinks.write(1, "train", {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


class WandBRun:
    """Stands in for a run of wandb."""

    def __init__(self, **options):
        self.options, self.lines, self.metrics, self.finished = options, [], [], False

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, line):
        self.lines.append(line)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch):
    runs: list[WandBRun] = []

    def init(**options):
        runs.append(WandBRun(**options))
        return runs[-1]

    module: Any = ModuleType("wandb")
    module.init = init
    module.__spec__ = ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


@pytest.mark.parametrize("choice", ["on", "auto"])
def test_wandb_gets_every_value_and_a_resumed_run_goes_on(tmp_path, wandb_runs, choice):
    for resumed in (0, 6, 0):
        with log.open_sinks(tmp_path, "off", resumed, choice) as sinks:
            sinks.write(resumed + 1, "train", {"loss": 2.0, "bad": float("nan")}, {"seconds": 0.5})
    first, second, third = wandb_runs
    assert first.lines == [{"step": 1, "train/loss": 2.0, "train/seconds": 0.5}]
    assert second.lines[0]["step"] == 7 and second.finished
    assert first.options["id"] == second.options["id"] != third.options["id"]
    assert first.options["resume"] == "allow" and first.options["dir"] == str(tmp_path)
    assert first.metrics == [("*", "step")]  # ours may come again, W&B's own only rise


def test_an_id_that_is_none_is_made_again(tmp_path, wandb_runs):
    (tmp_path / log.WANDB_ID).write_text("../x")
    log.open_sinks(tmp_path, "off", 6, "on").close()
    kept = (tmp_path / log.WANDB_ID).read_text().strip()
    assert wandb_runs[0].options["id"] == kept and len(kept) == 16


def test_wandb_that_is_missing_or_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"moezoo\[wandb\]"):
        log.open_sinks(tmp_path, "off", 0, "on")
    module: Any = ModuleType("wandb")
    module.init = Mock(side_effect=RuntimeError("api_key not configured\nsecond line"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match="did not begin .api_key not configured.: run"):
        log.open_sinks(tmp_path, "off", 0, "on")


def test_wandb_is_off_unless_asked(tmp_path, wandb_runs):
    log.open_sinks(tmp_path, "off").close()
    assert not wandb_runs and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
