"""Runs on a real Slurm: two nodes, processes that JAX's own detection brings together."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from moezoo.train import log
from tests.cluster import slurm
from tests.fixtures import ROOT
from tests.train.four import STEPS

LIMIT = 240  # seconds for anything
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    if (reason := slurm.missing()) is not None:
        pytest.skip(reason)
    # munge's socket needs a short path, which pytest's folders are not.
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:
        with slurm.running(Path(folder)) as env:
            yield env


def launched(
    env: Mapping[str, str], folder: Path, program: str, *words: str
) -> subprocess.Popen[str]:
    """`moezoo launch slurm` of a configuration file with this text."""
    file = folder / "small.py"
    file.write_text(program)
    own = {"JAX_PLATFORMS": "cpu", "MOEZOO_DATA": str(folder / "data")}
    own |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(ROOT)}
    own.setdefault("JAX_COMPILATION_CACHE_DIR", os.environ["JAX_COMPILATION_CACHE_DIR"])
    given = ["launch", "slurm", str(file), "--nodes", "2", "--directory", str(folder / "runs")]
    return subprocess.Popen(
        [sys.executable, "-m", "moezoo", *given, *words],
        env=dict(env) | own, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def until(holds, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


SMALL = "from tests.train.four import text as config\n"
# The first attempt of a job takes its time, so that a signal always finds it at work.
PACED = """
import os, time
from moezoo.domains.text.data.rows import TextTraining
from tests.train.four import text as config

def paced(self, step, rows=None, batch=TextTraining.batch):
    if "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(1)
    return batch(self, step, rows)

TextTraining.batch = paced
"""


def test_a_job_is_trained_asked_to_stop_queued_again_and_goes_on(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "text"
    process = launched(cluster, tmp_path, PACED)
    until(lambda: log.read(run / log.NAME), process)
    asked = ["squeue", "--noheader", "--format=%i"]
    (number,) = subprocess.run(asked, env=cluster, capture_output=True, text=True).stdout.split()
    subprocess.run(["scancel", "--signal=TERM", number], env=cluster, check=True)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    assert "All 2 processes are here, 1 devices in this one." in said
    stopped = re.findall(r"Stopped after step (\d+)", said)
    assert len(stopped) == 1 and 0 < int(stopped[0]) < STEPS, said
    assert f"from step {stopped[0]}" in said
    assert said.count("completed") == 1 and "pending" in said
    rows = log.read(run / log.NAME)
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == list(range(1, STEPS + 1)), "no step lost, none twice"
    state = ["scontrol", "--oneliner", "show", "job", number]
    shown = subprocess.run(state, env=cluster, capture_output=True, text=True).stdout
    assert "Restarts=1 " in shown and "NodeList=127.0.0.[1-2]" in shown


FAILS = """
import os
from moezoo.domains.text.data.rows import TextTraining
from moezoo.errors import UserError
from tests.train.four import text as config

def broken(self, step, rows=None, batch=TextTraining.batch):
    if step == 3 and os.environ.get("SLURM_PROCID") == "1":
        raise UserError("Example 3 is unreadable.")
    return batch(self, step, rows)

TextTraining.batch = broken
"""


def test_the_process_that_failed_first_is_shown(cluster: Mapping[str, str], tmp_path: Path) -> None:
    process = launched(cluster, tmp_path, FAILS, "--name", "fails")
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 2, said
    assert "Process 1 failed first, with exit code 2. The end of " in said
    assert "error: process 1: Example 3 is unreadable." in said


# The first attempt is slow to begin: a signal finds a program that cannot answer it yet.
SLOW = """
import os, time
if "SLURM_PROCID" in os.environ and "SLURM_RESTART_COUNT" not in os.environ:
    time.sleep(60)
from tests.train.four import text as config
"""


def test_a_job_that_is_asked_to_stop_before_it_has_begun_is_queued_again(
    cluster: Mapping[str, str], tmp_path: Path
) -> None:
    words = ("--name", "early", "--train.steps", "2", "--optimiser.warmup", "0")
    process = launched(cluster, tmp_path, SLOW, *words)
    logs = tmp_path / "runs" / "early" / "launch"
    until(lambda: len(list(logs.glob("[01].log"))) == 2, process)
    time.sleep(2)  # task.sh has started the program by then
    asked = ["squeue", "--noheader", "--format=%i"]
    (number,) = subprocess.run(asked, env=cluster, capture_output=True, text=True).stdout.split()
    subprocess.run(["scancel", "--signal=TERM", number], env=cluster, check=True)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, said
    assert "pending" in said and "Stopped after step" not in said


def test_ctrl_c_cancels_the_job(cluster: Mapping[str, str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "text"
    process = launched(cluster, tmp_path, PACED)
    until(lambda: log.read(run / log.NAME), process)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, said
    assert "which saves first" in said and "CANCELLED" in said
    assert "Stopped after step" in said, "the run has saved"
    asked = ["squeue", "--noheader", "--format=%i"]
    end = time.monotonic() + 60
    while subprocess.run(asked, env=cluster, capture_output=True, text=True).stdout.split():
        assert time.monotonic() < end, "the job has gone"
        time.sleep(0.5)


def test_what_slurm_refuses_is_one_sentence(cluster: Mapping[str, str], tmp_path: Path) -> None:
    process = launched(cluster, tmp_path, SMALL, "--partition", "nowhere")
    said, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 2
    assert said.splitlines()[-1].startswith("error: sbatch refused: sbatch: error: invalid partit")
