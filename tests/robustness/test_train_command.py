"""What people type wrong at `python train.py`: one sentence, exit code 2, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fixtures import ROOT

SMALL = ["--data.train", "4", "--data.test", "2", "--data.resolution", "16", "16"]
SMALL += [
    "--train.batch",
    "2",
    "--evaluate.batch",
    "2",
    "--model.width",
    "24",
    "--model.heads",
    "2",
]


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MOEZOO_DATA": str(folder / "data")} | environment
    env.pop("XLA_FLAGS", None)
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.run(
        [*command, "--directory", str(folder / "runs")],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--train.stepz", "3"], "train.steps"),
        (["--train.steps", "many"], "train.steps"),
        (["rooms/m3vit_tinny"], "rooms/m3vit_tiny"),
        (["--model.top_k", "9"], "top_k is 9"),
        (["--data.resolution", "60", "60"], "multiples of the patch"),
        (["--mesh.expert", "3"], "needs"),
        (["--tasks", "semseg", "dept"], "did you mean depth"),
    ],
)
def test_mistakes(tmp_path: Path, words: list[str], says: str) -> None:
    done = run(tmp_path, *words)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert says in lines[0]
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.slow
def test_help_lists_options(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert "--train.steps" in done.stdout and "--mesh.expert" in done.stdout


@pytest.mark.slow
def test_a_file_where_the_run_should_go(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    done = run(tmp_path, *SMALL)
    assert done.returncode == 2, done.stderr
    assert re.search(r"^error: .*runs", done.stderr.strip().splitlines()[-1])


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_continues(tmp_path: Path) -> None:
    words = [*SMALL, "--train.steps", "100000", "--train.log_every", "1"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MOEZOO_DATA": str(tmp_path / "data")}
    command = [sys.executable, str(ROOT / "train.py"), *words, "--directory", str(tmp_path)]
    process = subprocess.Popen(
        command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "m3vit_tiny" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    step = int(re.findall(r"Stopped after step (\d+)", output)[0])
    assert (tmp_path / "m3vit_tiny" / "checkpoints" / str(step) / "manifest.json").exists()
