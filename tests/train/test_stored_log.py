"""`metrics.jsonl` in an object store, which takes no single lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from moezoo import storage
from moezoo.errors import UserError
from moezoo.train import log
from tests.object_store import bucket, door

__all__ = ["bucket", "door"]


@pytest.fixture
def folder(bucket: str) -> Path:
    return storage.place(bucket) / "run"


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in log.read(folder / log.NAME)]


def test_lines_of_training_wait_and_scores_do_not(folder: Path) -> None:
    with log.open_sinks(folder) as sinks:
        sinks.write(1, "train", {"loss": 1.0})
        assert steps(folder) == []
        sinks.write(1, "test", {"score": 1.0})
        assert steps(folder) == [1, 1]
        sinks.write(2, "train", {"loss": 1.0})
        sinks.flush()  # as before a checkpoint
        assert steps(folder) == [1, 1, 2]
        sinks.write(3, "train", {"loss": 1.0})
    assert steps(folder) == [1, 1, 2, 3]


def test_lines_do_not_wait_for_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.StoredLines, "PAUSE", 0.0)
    with log.open_sinks(folder) as sinks:
        sinks.write(1, "train", {"loss": 1.0})
        assert steps(folder) == [1]


def test_a_resumed_run_goes_on_in_the_file(folder: Path) -> None:
    with log.open_sinks(folder) as sinks:
        for step in (1, 2, 3):
            sinks.write(step, "train", {"loss": 1.0})
    with log.open_sinks(folder, resumed=2) as sinks:
        assert steps(folder) == [1, 2]
        sinks.write(3, "train", {"loss": 1.0})
    assert steps(folder) == [1, 2, 3]


def test_who_is_told_to_leave_at_once_writes_no_more(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), log.open_sinks(folder) as sinks:
        sinks.write(1, "train", {"loss": 1.0})
        raise KeyboardInterrupt
    assert steps(folder) == []


def test_files_that_grow_line_by_line_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="set log.tensorboard to auto"):
        log.open_sinks(folder, tensorboard="on")
