"""What growth costs: a system, a dense task and a domain that the package does not know.

They are trained, resumed, evaluated, pruned to a task, exported and reloaded without moezoo, of
which no file changes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.fixtures import ROOT

# An interpreter in which moezoo cannot be imported.
ALONE = (
    "import runpy, sys; sys.modules['moezoo'] = sys.modules['flax'] = None; "
    "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], None, '__main__')"
)


def run(*words: object, alone: bool = False) -> str:
    """What a command prints; it must end well."""
    python = [sys.executable, "-I", "-c", ALONE] if alone else [sys.executable]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*python, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def grown(tmp_path: Path, name: str, task: str, keep: int) -> Path:
    """Train, resume, evaluate, prune and export; the folder of the pruned export."""
    folder = tmp_path / name
    train = ("train.py", f"tests/growth/{name}_run.py", "--directory", tmp_path)
    run(*train)
    assert "from step 4" in run("train.py", "--resume", folder, "--train.steps", 6)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row[f"loss/{task}"] for row in rows if f"loss/{task}" in row]
    assert len(losses) == 6 and np.isfinite(losses).all()
    assert "report.md" in {path.name for path in folder.iterdir()}
    run("tools/evaluate.py", folder, "--json", tmp_path / "scores.json")
    assert task in json.loads((tmp_path / "scores.json").read_text())["scores"]
    run("tools/export.py", folder, "--task", task, "--out", tmp_path / "whole", "--calibration", 8)
    words = ("--task", task, "--keep", keep, "--calibration", 8, "--out", tmp_path / "pruned")
    run("tools/prune.py", folder, *words)
    stated = json.loads((tmp_path / "pruned/certificate.json").read_text())
    layers = stated["layers"].values()
    assert stated["kind"] == "pruned" and layers
    assert all(len(layer["kept"]) == keep < layer["experts"] for layer in layers)
    return tmp_path / "pruned"


@pytest.mark.slow
def test_a_domain_a_task_and_a_system_from_outside(tmp_path: Path) -> None:
    export = grown(tmp_path, "numbers", "total", keep=2)
    (tmp_path / "line.txt").write_text("1 2 3 4 5 6")
    said = run(
        export / "predict.py", tmp_path / "line.txt", "--out", tmp_path / "n.png", alone=True
    )
    assert "total" in said and "(value)" in said


@pytest.mark.slow
@pytest.mark.claims
def test_a_dense_task_and_a_system_from_outside(tmp_path: Path) -> None:
    export = grown(tmp_path, "brightness", "brightness", keep=2)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.full((20, 30, 3), 200, np.uint8)).save(photo)
    run(export / "predict.py", photo, "--out", tmp_path / "painted.png", alone=True)
    with Image.open(tmp_path / "painted.png") as painted:
        assert painted.size == (30, 20)
