"""Processes that should meet: real ones, each with a mistake of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

import pytest

from moezoo.errors import UserError
from moezoo.train import join
from moezoo.train.schema import HostsConfig
from tests.fixtures import ROOT
from tests.train.test_mesh import free_port


def test_single_machine_is_one_process() -> None:
    said: list[str] = []
    assert join.initialise_distributed(HostsConfig(), said.append) == 1
    assert said == []


def test_half_given_hosts_are_a_user_error() -> None:
    with pytest.raises(UserError, match="belong together"):
        join.initialise_distributed(HostsConfig(count=2))


def test_a_cluster_that_does_not_say_how_large_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"JOB_ID": "1", "STEP_NODELIST": "a,b", "NTASKS": "two", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with pytest.raises(UserError, match="looks like a host of a cluster"):
        join.initialise_distributed(HostsConfig())
    monkeypatch.setenv("SLURM_NTASKS", "2")
    place = join._place(HostsConfig(timeout=7), join.detected_processes())
    assert place is not None and place[0] == "a" and place[2:5] == (0, 2, 7)


def test_other_devices() -> None:
    eight = {"host": "a", "count": 8, "kind": "TPU v5e"}
    said = [json.dumps(eight | more) for more in ({}, {}, {"host": "c", "count": 4})]
    join.check_devices(said[:2])
    with pytest.raises(UserError, match=r"Process 2 \(c\) has 4 devices \(TPU v5e\), but"):
        join.check_devices(said)


# {before} is what a process does first, for example to be another version.
PROCESS = """
import sys
import jax
from types import SimpleNamespace
from moezoo.errors import run_command
from moezoo.train import join, roll_call, together
jax.config.update("jax_platforms", "cpu")
coordinator, count, index, timeout, devices, before = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", int(devices))
exec(before)
def main():
    given = dict(coordinator=coordinator, count=int(count), index=int(index), timeout=int(timeout))
    with together.ending():
        join.initialise_distributed(SimpleNamespace(**given))
    print("joined", flush=True)
run_command(main)
"""


def start(
    port: int, index: int, count: int = 2, timeout: int = 20, devices: int = 1, before: str = "",
    host: str = "127.0.0.1",
) -> subprocess.Popen[str]:  # fmt: skip
    words = [f"{host}:{port}", str(count), str(index), str(timeout), str(devices), before]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS, *words], stdout=pipe, stderr=pipe, text=True, cwd=ROOT
    )


def ends(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    """The last line of each: all end within a minute with exit code 2 and one sentence."""
    began, found = time.monotonic(), []
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert "Traceback" not in errors and "stack trace" not in errors
        found.append(errors.strip().splitlines()[-1])
        assert found[-1].startswith("error: ")
    assert time.monotonic() - began < 60
    return found


def test_a_missing_process_ends_in_one_sentence() -> None:
    (said,) = ends([start(free_port(), 0, timeout=2)])
    assert "Expected 2 processes, found 1 within 2 s" in said and "missing: 1" in said


@pytest.mark.slow
def test_only_another_worker_was_started() -> None:
    (said,) = ends([start(free_port(), 1, timeout=2)])
    assert "did not find process 0 at 127.0.0.1:" in said


@pytest.mark.slow
def test_a_wrong_coordinator() -> None:
    port = free_port()
    right, wrong = ends([start(port, 0, timeout=4), start(port, 1, timeout=4, host="no.invalid")])
    assert "missing: 1" in right
    assert "there is no host 'no.invalid'" in wrong


@pytest.mark.slow
def test_a_port_in_use() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        first, second = ends([start(port, 0, timeout=3), start(port, 1, timeout=3)])
    assert f"cannot listen at port {port}" in first and "127.0.0.1" in second


@pytest.mark.slow
def test_a_coordinator_of_another_run_on_that_port() -> None:
    """Which JAX would share the port with, and answer half of the processes for."""
    port = free_port()
    code = (
        "import jax, sys, time; jax.config.update('jax_platforms', 'cpu');"
        f"jax.distributed.initialize('127.0.0.1:{port}', 1, 0); print('up', flush=True);"
        "time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "up\n"
        ends([start(port, 0, timeout=3), start(port, 1, timeout=3)])
    finally:
        other.kill()
        other.wait()


@pytest.mark.slow
def test_the_same_number_twice() -> None:
    port = free_port()
    said = ends([start(port, index, count=3) for index in (0, 1, 1)])
    assert len(set(said)) == 1 and "Two processes say that they are process 1" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "before", "wanted"),
    [
        (1, "roll_call.checksum = lambda: 'other'", "files have the checksum other"),
        (1, "import moezoo; moezoo.__version__ = '9.9'", "runs moezoo 9.9, but process 0"),
        (2, "", "has 2 devices (cpu), but process 0"),
    ],
)
def test_processes_that_are_not_alike(devices: int, before: str, wanted: str) -> None:
    port = free_port()
    said = ends([start(port, 0), start(port, 1, devices=devices, before=before)])
    assert all(wanted in line for line in said), said


@pytest.mark.slow
def test_one_that_is_killed_while_another_waits_for_it() -> None:
    """As in a save: nothing is being computed together, and silence is all that is heard."""
    assert join.SILENCE <= 50, "within a minute"
    port, patient = free_port(), "join.SILENCE = 4\n"
    dies = "import os; together.listen = lambda: os.kill(os.getpid(), 9)"
    waits, killed = (
        start(port, index, before=patient + more) for index, more in enumerate(("", dies))
    )
    killed.communicate(timeout=60)
    began = time.monotonic()
    _, errors = waits.communicate(timeout=60)
    assert waits.returncode != 0 and time.monotonic() - began < 30
    assert "Lost another process" in errors or "another task died" in errors, errors
