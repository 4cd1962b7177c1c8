"""A whole run in an emulated object store: stopped, killed, the store away for ten seconds.

It ends as a run on a disk that nobody interrupted, and what is made of it lies in the store, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo import storage
from moezoo.cli.entry import COMMANDS
from moezoo.errors import UserError
from moezoo.train import manifest, restore, start
from moezoo.train.checkpoint import Checkpointer
from moezoo.train.log import read
from tests.fixtures import ROOT
from tests.object_store import Door, bucket, door

__all__ = ["bucket", "door"]

WORDS = ["--name", "run", "--data.train", "8", "--data.test", "8", "--data.resolution", "16", "16"]
WORDS += ["--model.width", "24", "--model.heads", "2", "--model.depth", "2", "--tasks", "depth"]
WORDS += ["--train.batch", "8", "--evaluate.batch", "8", "--evaluate.pictures", "1"]
WORDS += ["--optimiser.warmup", "5", "--train.steps", "20", "--train.log_every", "1"]
WORDS += ["--checkpoint.every", "4"]


def train(folder: Path, directory: Any) -> subprocess.Popen:
    """The run in a process of its own."""
    given = {"JAX_PLATFORMS": "cpu", "MOEZOO_DATA": str(folder / "data"), "PYTHONPATH": str(ROOT)}
    given["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    words = ["train", "rooms/m3vit_tiny", *WORDS, "--directory", str(directory)]
    return subprocess.Popen(
        [sys.executable, "-m", "moezoo", *words],
        env=os.environ | given,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def call(command: str, *words: str) -> None:
    """A command of moezoo in this process."""
    import_module(f"moezoo.cli.{COMMANDS[command]}").main(list(words), f"moezoo {command}")


def end(process: subprocess.Popen, code: int | None = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert code is None or process.returncode == code, output
    return output


def until(run: Path, step: int, process: subprocess.Popen) -> None:
    """Wait until measurements of a step are there."""
    deadline = time.monotonic() + 200
    while not any(row["step"] >= step for row in read(run / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def measured(run: Path) -> list[dict[str, Any]]:
    return [row | {"timing": None} for row in read(run / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_in_a_store_equals_one_on_a_disk(
    tmp_path: Path, bucket: str, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(train(tmp_path, tmp_path / "runs"))
    plain, run = tmp_path / "runs" / "run", storage.place(f"{bucket}/runs/run")

    process = train(tmp_path, f"{bucket}/runs")
    until(run, 4, process)
    process.send_signal(signal.SIGTERM)
    assert "the same command continues" in end(process, None)

    process = train(tmp_path, f"{bucket}/runs")
    until(run, 8, process)
    process.kill()  # often in the middle of a checkpoint
    end(process, None)

    process = train(tmp_path, f"{bucket}/runs")
    until(run, 12, process)
    door.shut(10)
    output = end(process)
    assert "Resuming" in output and "Report: gs://" in output and door.refused

    expected, found = start.read(plain), start.read(run)
    for group, arrays in expected.items():
        assert arrays.keys() == found[group].keys()
        for path, value in arrays.items():
            np.testing.assert_array_equal(np.asarray(found[group][path]), value, err_msg=path)
    assert measured(run) == measured(plain)
    names = {path.relative_to(run).parts[0] for path in run.rglob("*")}
    assert names == {path.name for path in plain.iterdir()} - {"tensorboard"}
    assert sorted(path.name for path in (run / "pictures").iterdir()) == sorted(
        path.name for path in (plain / "pictures").iterdir()
    )
    assert not (tmp_path / "gs:").exists() and not (ROOT / "gs:").exists()
    monkeypatch.setenv("MOEZOO_DATA", str(tmp_path / "data"))
    _use(tmp_path, bucket)


def _use(folder: Path, bucket: str) -> None:
    """Every command that takes a run or writes a folder, with both in the store."""
    run, out = f"{bucket}/runs/run", f"{bucket}/exports/depth"
    call("evaluate", run, "--json", f"{bucket}/scores.json")
    scores = json.loads(storage.place(f"{bucket}/scores.json").read_bytes())
    assert scores["step"] == 20
    words = ["--task", "depth", "--keep", "2", "--calibration", "4", "--out", out]
    call("prune", run, *words)
    with pytest.raises(UserError, match="exists: choose another folder, or add --replace"):
        call("prune", run, *words)
    call("verify", out)
    photo = str(ROOT / ".github" / "pictures" / "room.png")
    call("predict", out, photo, "--out", str(folder / "depth.png"))
    assert (folder / "depth.png").stat().st_size
    with pytest.raises(UserError, match="only a local path can be"):
        call("predict", out, photo, "--out", f"{bucket}/depth.png")
    call("save", run, "--out", f"{bucket}/models/depth")
    call("evaluate", f"{bucket}/models/depth")


def test_a_checkpoint_counts_when_its_last_file_is_there(bucket: str) -> None:
    said: list[str] = []
    folder = storage.place(bucket) / "run" / "checkpoints"
    tree = {"params": {"w": np.arange(6.0, dtype=np.float32)}}
    with Checkpointer(folder, "{}", say=said.append) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]
    (folder / "3" / manifest.NAME).unlink()  # as if it had been killed before
    assert restore.find(folder).name == "2"
    with Checkpointer(folder, "{}", say=said.append) as checkpoints:
        assert checkpoints.latest_valid() == 2
        assert not (folder / "3").exists() and not said
        found = checkpoints.restore(2, tree)
        np.testing.assert_array_equal(found["params"]["w"], tree["params"]["w"])
        # Damage: a file that is shorter, another one of the same size, none.
        checkpoints.save(4, tree)
        checkpoints.wait()
        files = sorted((folder / "4" / "arrays").rglob("*"), key=lambda f: f.stat().st_size)
        content = files[-1].read_bytes()
        for damaged in (content[:-1], bytes([content[0] ^ 1]) + content[1:], None):
            files[-1].unlink() if damaged is None else files[-1].write_bytes(damaged)
            assert checkpoints.latest_valid() == 2
            assert "4, which is damaged" in said[-1]
        files[-1].write_bytes(content)
        assert checkpoints.latest_valid() == 4


def test_a_checkpoint_is_written_while_the_store_is_away(bucket: str, door: Door) -> None:
    folder = storage.place(bucket) / "run" / "checkpoints"
    tree = {"params": {"w": np.arange(6.0, dtype=np.float32)}}
    with Checkpointer(folder, "{}") as checkpoints:
        door.shut(3)
        checkpoints.save(1, tree)
        checkpoints.wait()
        door.shut(3)
        assert checkpoints.latest_valid() == 1
        door.shut(3)
        found = checkpoints.restore(1, tree)
    np.testing.assert_array_equal(found["params"]["w"], tree["params"]["w"])
    assert door.refused > 3


def test_a_store_that_stays_away_damages_nothing(
    bucket: str, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_pause(seconds: float) -> None:
        return None

    folder = storage.place(bucket) / "run" / "checkpoints"
    tree = {"params": {"w": np.arange(6.0, dtype=np.float32)}}
    said: list[str] = []
    with Checkpointer(folder, "{}", say=said.append) as checkpoints:
        checkpoints.save(1, tree)
        checkpoints.wait()
        with monkeypatch.context() as impatient:
            impatient.setattr("gcsfs.retry.asyncio.sleep", no_pause)
            door.shut(60)
            with pytest.raises(UserError, match="Could not reach gs://"):
                checkpoints.latest_valid()
            with pytest.raises(UserError, match="Could not reach gs://"):
                restore.find(folder)
            with pytest.raises(OSError):
                manifest.read(folder / "1")
            door.shut(0)
        # Nothing of it was taken for damage.
        assert checkpoints.latest_valid() == 1 and checkpoints.skipped() == 0 and not said
