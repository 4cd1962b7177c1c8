"""The same numbers whoever computes them: two or four processes over data x fsdp x expert, and one.

Also where a run goes on with another number of processes and devices than it began with.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moezoo.nn.module import flatten
from moezoo.train import log, start
from tests.fixtures import ROOT
from tests.train.test_processes import LIMIT, Pair, environment

STEPS, HALF = 6, 3
FILE = """
from __future__ import annotations

from dataclasses import replace

from moezoo.train.config import OptimConfig, TrainConfig
from tests.train import four

base = four.{domain}
config = replace(
    base,
    # Adam divides by the size of gradients, and rounding errors of small ones become steps.
    optimiser=OptimConfig(kind="sgd", lr=1e-2, schedule="constant"),
    train=TrainConfig(steps={steps}, batch=8, log_every=1, importance_weight=0.0),
    evaluate=replace(base.evaluate, batch=8),
    checkpoint=replace(base.checkpoint, every={half}),
)
"""
# By domain: the axes beside data, which has the rest.
DOMAINS = {
    "images": ("--mesh.fsdp", "2", "--mesh.expert", "2"),
    "text": ("--mesh.fsdp", "4"),
    "sounds": ("--mesh.fsdp", "4"),
    "pairs": ("--mesh.fsdp", "2", "--mesh.expert", "2"),
}
# The two that take longest, and four processes, run with the claims.
SLOW = [pytest.param(domain, marks=pytest.mark.claims) for domain in ("sounds", "pairs")]


class Alone(Pair):
    """One process on `devices` devices."""

    def __init__(self, folder: Path, words: list[str], devices: int):
        env = environment(folder) | {"JAX_NUM_CPU_DEVICES": str(devices)}
        command = [sys.executable, str(ROOT / "train.py"), *words]
        pipe = subprocess.PIPE
        self.hosts = [
            subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=pipe, stderr=pipe)
        ]

    def end(self) -> None:
        """Wait for it; AssertionError where it fails."""
        output, error = self.hosts[0].communicate(timeout=LIMIT)
        assert self.hosts[0].returncode == 0, (output, error)


def losses(run: Path) -> list[float]:
    """The total loss of every step, in order."""
    rows = [row for row in log.read(run / log.NAME) if row["split"] == "train"]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss/total"] for row in rows]


def same(one: Path, other: Path) -> None:
    """AssertionError where losses or final parameters differ by more than 1e-5."""
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-5)
    here, there = (flatten(start.read(run)["params"]) for run in (one, other))
    assert here.keys() == there.keys()
    for path, value in here.items():
        np.testing.assert_allclose(value, there[path], rtol=1e-5, atol=1e-5, err_msg=path)


def words_of(domain: str, folder: Path) -> list[str]:
    """The configuration and options of every run of a domain."""
    file = folder / f"{domain}.py"
    file.write_text(FILE.format(domain=domain, steps=STEPS, half=HALF))
    return [str(file), "--directory", str(folder / "runs"), "--evaluate.pictures", "0"]


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["images", "text", *SLOW])
def test_the_same_losses_and_parameters(
    domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, mesh = words_of(domain, tmp_path), DOMAINS[domain]
    Alone(tmp_path, [*words, "--name", "one"], 1).end()
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "4")  # of each of two processes
    Alone(tmp_path, [*words, "--name", "moved", *mesh, "--train.steps", str(HALF)], 4).end()
    resumed = ["--resume", str(tmp_path / "runs" / "moved"), "--train.steps", str(STEPS)]
    for given in ([*words, "--name", "two", *mesh], resumed):
        codes, outputs, errors = Pair(tmp_path, given).finish()
        assert codes == [0, 0], (outputs, errors)
    one, two, moved = (tmp_path / "runs" / name for name in ("one", "two", "moved"))
    assert "from step 3" in outputs[0]
    same(one, two)
    same(one, moved)


@pytest.mark.slow
@pytest.mark.claims
@pytest.mark.parametrize("domain", DOMAINS)
def test_four_processes(domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, mesh = words_of(domain, tmp_path), DOMAINS[domain]
    Alone(tmp_path, [*words, "--name", "one"], 1).end()
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "2")  # of each: eight in all
    four = Pair(tmp_path, [*words, "--name", "four", *mesh], [()] * 4)
    codes, outputs, errors = four.finish()
    assert codes == [0] * 4, (outputs, errors)
    same(tmp_path / "runs" / "one", tmp_path / "runs" / "four")
