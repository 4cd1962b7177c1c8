"""Whole runs of two real processes: trained, interrupted, resumed, read back by the tools."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from moezoo.train import log
from tests.fixtures import ROOT
from tests.train.four import STEPS

# The other two take two minutes; tests/domains/{audio,pairs} train and resume them on a mesh.
OTHERS = (pytest.param(domain, marks=pytest.mark.claims) for domain in ("sounds", "pairs"))
DOMAINS = ("images", "text", *OTHERS)
LIMIT = 240  # seconds for anything


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that the coordinator of these processes can open, and nobody else takes before."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]


def environment(folder: Path) -> dict[str, str]:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "MOEZOO_DATA": str(folder / "data"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    return env


class Pair:
    """The processes of one run, mostly two; `words` go to all, `only[index]` to one."""

    def __init__(
        self, folder: Path, words: Sequence[str], only: Sequence[Sequence[str]] = ((), ())
    ):
        self._port = reserved_port()
        port = self._port.__enter__()
        self.hosts = []
        for index in range(len(only)):
            hosts = {"coordinator": f"localhost:{port}", "count": len(only), "index": index}
            given = [word for name, v in hosts.items() for word in (f"--hosts.{name}", str(v))]
            command = [sys.executable, str(ROOT / "train.py"), *words, *given, *only[index]]
            self.hosts.append(
                subprocess.Popen(
                    command, env=environment(folder), cwd=ROOT, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip

    def finish(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, outputs and errors."""
        try:
            found = [host.communicate(timeout=LIMIT) for host in self.hosts]
        finally:
            self._port.__exit__(None, None, None)
            for host in self.hosts:
                host.kill()
        return [host.returncode for host in self.hosts], *map(list, zip(*found, strict=True))


# A model of the user's own, which only this file defines.
OWN = """
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from moezoo.models.m3vit.model import M3ViTConfig
from tests.train.four import images


@dataclass(frozen=True)
class OwnConfig(M3ViTConfig):
    taste: Literal["sweet", "sour"] = "sweet"


config = replace(images, model=OwnConfig(**vars(images.model)))
"""


def config_file(folder: Path, domain: str) -> Path:
    file = folder / f"{domain}.py"
    own = domain == "images"
    file.write_text(OWN if own else f"from tests.train.four import {domain} as config\n")
    return file


def tools(folder: Path, *commands: Sequence[object]) -> str:
    """The output of tools that run one after the other in a process of their own; all exit 0."""
    program = (
        "import json, runpy, sys\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = words\n"
        "    try: runpy.run_path(words[0], run_name='__main__')\n"
        "    except SystemExit as stop: assert not stop.code, (words, stop.code)\n"
    )
    words = [[str(word) for word in command] for command in commands]
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(words)],
        env=environment(folder) | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


def read_back(run: Path, domain: str, out: Path) -> list[list[object]]:
    """The tools that turn a run of a domain into something else."""
    if domain == "text":
        return [
            ["tools/adapter.py", run, "--out", out, "--merge"],
            ["tools/generate.py", run, "copy\nab", "--new", "2"],
        ]
    task = {"images": "depth", "sounds": "event", "pairs": "scene"}[domain]
    made: list[list[object]] = [
        ["tools/export.py", run, "--task", task, "--out", out, "--calibration", "2"]
    ]
    if domain == "images":
        pruned = out.with_name("pruned")
        made.append(
            ["tools/prune.py", run, "--task", task, "--keep", "1", "--out", pruned]
            + ["--calibration", "2"]
        )
        made.append(["tools/predict.py", pruned, run / "pictures" / "usage.png"])
        made[-1] += ["--out", out.with_name("predicted.png")]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_a_run_of_each_domain_from_start_to_export(folder: Path, domain: str) -> None:
    run = folder / "runs" / domain
    words = [str(config_file(folder, domain)), "--directory", str(folder / "runs")]
    pair = Pair(folder, words)
    until = time.monotonic() + LIMIT
    while not log.read(run / log.NAME) and time.monotonic() < until:
        assert pair.hosts[0].poll() is None, pair.finish()
        time.sleep(0.02)
    pair.hosts[1].send_signal(signal.SIGTERM)  # one of them is told, both stop
    codes, outputs, errors = pair.finish()
    assert codes == [130, 130], (outputs, errors)
    assert "Stopped after step" in outputs[0]
    assert "".join(errors).count("rendering rooms, train") <= 1, "data are made once"
    stopped = log.read(run / log.NAME)[-1]["step"]
    assert 0 < stopped < STEPS

    codes, outputs, errors = Pair(folder, words).finish()
    assert codes == [0, 0], (outputs, errors)
    assert f"from step {stopped}" in outputs[0]
    said = [line for line in outputs[1].splitlines() if not line.startswith("[Gloo]")]
    assert not said, "only the first process speaks"
    rows = log.read(run / log.NAME)
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, STEPS + 1))
    report = (run / "report.md").read_text()
    assert re.search(rf"{STEPS} of 2 (images|rows|clips|examples), seed", report)
    assert (run / "pictures" / "usage.json").is_file()
    assert not list((folder / "runs").rglob("*.tmp")), "no leftovers"

    scores, out = folder / f"{domain}.json", folder / domain / "export"
    tools(
        folder,
        ["tools/evaluate.py", run, "--json", scores],
        *read_back(run, domain, out),
    )
    found = json.loads(scores.read_text())
    (last,) = [row for row in rows if row["split"] == "test"]
    assert found["step"] == STEPS
    for task, part in found["scores"].items():
        for name, value in part.items():
            assert value == pytest.approx(last[f"{task}/{name}"], rel=1e-3, abs=1e-3, nan_ok=True)
    assert any(out.iterdir())


# Process 1 meets an example that it cannot read, or a mistake in the program, or is killed.
BREAKS = """
import os, signal, sys

from moezoo.domains.text.data.rows import TextTraining
from moezoo.errors import UserError
from tests.train.four import text as config

def broken(self, step, rows=None, batch=TextTraining.batch):
    if step == 8 and sys.argv[sys.argv.index("--hosts.index") + 1] == "1":
        {fails}
    return batch(self, step, rows)

TextTraining.batch = broken
"""
WAYS = {
    "sentence": ('raise UserError("Example 8 is unreadable.")', (2, 2)),
    "mistake": ("raise KeyError(8)", (1, 1)),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", (1, -signal.SIGKILL)),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_where_one_fails_the_others_end_promptly(folder: Path, way: str) -> None:
    fails, wanted = WAYS[way]
    file = folder / f"{way}.py"
    file.write_text(BREAKS.format(fails=fails))
    began = time.monotonic()
    words = [str(file), "--directory", str(folder / "runs"), "--name", way]
    codes, outputs, errors = Pair(folder, words).finish()
    assert tuple(codes) == wanted, (outputs, errors)
    assert time.monotonic() - began < LIMIT / 2
    last = errors[0].strip().splitlines()[-1]
    said = {
        "sentence": "error: process 1 of this run has failed: Example 8 is unreadable.",
        "mistake": "error: process 1 of this run has failed: KeyError: 8",
        "killed": "error: Lost another process of this run",
    }[way]
    assert last.startswith(said), errors
    assert errors[1].count("Traceback") == (way == "mistake")
    assert errors[0].count("Traceback") == 0


@pytest.mark.slow
def test_processes_that_were_started_differently(folder: Path) -> None:
    file = config_file(folder, "text")
    words = [str(file), "--directory", str(folder / "runs"), "--name", "other"]
    only = ((), ("--train.batch", "4"))
    codes, _, errors = Pair(folder, words, only).finish()
    assert codes == [2, 2]
    for index in range(2):  # before JAX has connected anything
        assert "error: train.batch is 4 in process 1 (" in errors[index], errors
        assert "but 2 in process 0 (" in errors[index] and "All 2 processes" not in errors[index]
    assert not (folder / "runs" / "other").exists()
