"""A run killed with SIGKILL again and again, also while saving, ends as one that never was."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moezoo.nn import module
from moezoo.train import restore
from moezoo.train.domain import Classes
from moezoo.train.log import read
from moezoo.train.setup import make_builder, make_tasks
from tests.fixtures import ROOT

WORDS = ["--data.train", "6", "--data.test", "2", "--data.resolution", "16", "16"]
WORDS += ["--model.width", "24", "--model.heads", "2", "--model.depth", "2"]
WORDS += ["--train.batch", "2", "--evaluate.batch", "2", "--evaluate.pictures", "1"]
WORDS += [
    "--optimiser.warmup",
    "5",
    "--train.steps",
    "60",
    "--train.log_every",
    "1",
    "--checkpoint.every",
    "2",
]
CLASSES = {"semseg": 14, "parts": 17}


def start(folder: Path, directory: Path) -> subprocess.Popen:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOEZOO_DATA": str(folder / "data"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *WORDS, "--directory", str(directory)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def parameters(run: Path) -> dict[str, np.ndarray]:
    config = restore.read_config(run)
    parts = module.abstract(make_builder(config, make_tasks(config, Classes(CLASSES))))
    loaded = restore.load_params(run, {"params": parts.params, "stats": parts.stats})
    assert loaded["step"] == 60
    return {k: np.asarray(v) for k, v in module.flatten(loaded["params"]).items()}


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has the run `whole/m3vit_tiny`, which nobody interrupted, its data and compiled programs."""
    made = tmp_path_factory.mktemp("kill")
    finish(start(made, made / "whole"))
    return made


# Among the claims: what checkpoints promise is tested with a small state, many kills and no
# compilation in tests/train/test_checkpoint_processes.py.
@pytest.mark.slow
@pytest.mark.claims
@pytest.mark.parametrize("kills", [2, 10])
def test_a_run_killed_again_and_again(folder: Path, kills: int) -> None:
    directory = folder / f"killed{kills}"
    run = directory / "m3vit_tiny"
    chance = random.Random(0)
    for kill in range(kills):
        process = start(folder, directory)
        wanted = 50 * (kill + 1) // kills
        deadline = time.monotonic() + 300
        while True:
            rows = read(run / "metrics.jsonl")
            if process.poll() is not None or (rows and rows[-1]["step"] >= wanted):
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(chance.uniform(0.0, 0.3))  # every second step saves: often in the middle of it
        process.kill()
        process.communicate()
    finish(start(folder, directory))
    expected, found = parameters(folder / "whole" / "m3vit_tiny"), parameters(run)
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.slow
@pytest.mark.claims
def test_truncated_newest_checkpoint_is_skipped(folder: Path) -> None:
    run = folder / "whole" / "m3vit_tiny"
    expected = parameters(run)
    newest = run / "checkpoints" / "60"
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    output = finish(start(folder, folder / "whole"))
    assert "60" in output and "Resuming" in output
    for path, value in parameters(run).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)
