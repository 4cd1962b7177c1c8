"""Processes that belong together: shown, told of signals, ended together, none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from moezoo.errors import UserError
from moezoo.launch import processes
from moezoo.launch.job import Command
from moezoo.train import log
from tests.fixtures import ROOT
from tests.train.test_processes import config_file, environment

LIMIT = 240


def python(code: str) -> Command:
    return Command((sys.executable, "-u", "-c", f"import os, signal, sys, time\n{code}"))


def test_all_end_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [python("print('from 0')"), python("print('from 1')")]
    assert processes.run_all(members, tmp_path) == 0
    assert capsys.readouterr().out == "from 0\n", "only process 0 is shown"
    assert (tmp_path / "1.log").read_text() == "from 1\n"


def test_the_first_to_fail_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = repr(str(tmp_path / "gone"))  # a busy machine may start them in any order
    later = f"while not os.path.exists({gone}): time.sleep(0.05)\n"
    later += "time.sleep(1); print('lost the other'); sys.exit(1)"
    first = f"print('the reason'); open({gone}, 'w').close(); os._exit(7)"
    members = [python(later), python(first), python(later)]
    assert processes.run_all(members, tmp_path) == 7
    said = capsys.readouterr().out
    assert "Process 1 failed first, with exit code 7. The end of" in said
    assert said.endswith("the reason\n")


def test_one_that_ends_because_of_another_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "print('error: process 1 of this run has failed: bad news.'); sys.exit(2)"
    members = [python(told), python("print('bad news'); time.sleep(0.6); sys.exit(2)")]
    assert processes.run_all(members, tmp_path) == 2
    assert "Process 1 failed first, with exit code 2" in capsys.readouterr().out


def test_a_killed_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [python("os.kill(os.getpid(), signal.SIGKILL)"), python("pass")]
    assert processes.run_all(members, tmp_path) == 137
    assert "Process 0 failed first, with exit code 137" in capsys.readouterr().out


def test_those_that_hang_after_a_failure_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "OTHERS", 0.3)
    monkeypatch.setattr(processes, "ASKED", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf'); time.sleep(60)"
    began = time.monotonic()
    assert processes.run_all([python(deaf), python("time.sleep(0.5); sys.exit(3)")], tmp_path) == 3
    assert time.monotonic() - began < 20


def test_what_cannot_be_started(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Could not start the processes .*nothing runs"):
        processes.run_all([python("time.sleep(60)"), Command(("no-such-program",))], tmp_path)


LAUNCHER = """
import sys
from pathlib import Path
from moezoo.launch import processes
from moezoo.launch.job import Command
logs, code = sys.argv[1:]
sys.exit(processes.run_all([Command((sys.executable, "-u", "-c", code))] * 2, Path(logs)))
"""
MEMBER = """
import os, signal, sys, time
def stop(number, frame):
    print("saved after", number)
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
print("pid", os.getpid())
time.sleep(60)
"""


def launched(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher of two, and their numbers once both are ready."""
    words = [sys.executable, "-c", LAUNCHER, str(folder), MEMBER]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    end = time.monotonic() + 60
    logs = [folder / "0.log", folder / "1.log"]
    while not all(one.exists() and one.read_text().endswith("\n") for one in logs):
        assert time.monotonic() < end
        time.sleep(0.02)
    return process, [int(one.read_text().split()[1]) for one in logs]


def are_gone(pids: Sequence[int]) -> bool:
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_all(tmp_path: Path, number: int) -> None:
    process, pids = launched(tmp_path)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"saved after {int(number)}\n" in said and "failed first" not in said
    assert (tmp_path / "1.log").read_text().endswith(f"saved after {int(number)}\n")
    assert are_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a parent's end")
def test_a_killed_launcher_leaves_nobody_behind(tmp_path: Path) -> None:
    process, pids = launched(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    assert are_gone(pids)
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


LARGER = ("--train.batch", "4", "--evaluate.batch", "4", "--devices", "2")


def words_of(folder: Path, *more: str) -> list[str]:
    file = config_file(folder, "text")
    own = ["--directory", str(folder / "runs"), *more]
    return [sys.executable, "-m", "moezoo", "launch", "local", str(file), *own]


def launch(folder: Path, *more: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        words_of(folder, *more), env=environment(folder) | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT, text=True, stdout=pipe, stderr=pipe,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_is_launched_stopped_and_launched_again(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "text"
    process = launch(tmp_path, *LARGER)
    end = time.monotonic() + LIMIT
    while not log.read(run / log.NAME):
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, (said, errors)
    assert "All 2 processes are here, 2 devices in this one." in said
    assert "Stopped after step" in said
    again = launch(tmp_path, *LARGER)
    said, errors = again.communicate(timeout=LIMIT)
    assert again.returncode == 0, (said, errors)
    assert "Resuming" in said
    steps = [row["step"] for row in log.read(run / log.NAME) if row["split"] == "train"]
    assert steps == list(range(1, len(steps) + 1)), "no step lost, none twice"


@pytest.mark.slow
def test_a_run_that_fails_shows_who_failed_first(tmp_path: Path) -> None:
    from tests.train.test_processes import BREAKS, WAYS

    file = tmp_path / "breaks.py"
    file.write_text(BREAKS.format(fails=WAYS["killed"][0]))
    words = words_of(tmp_path, "--name", "breaks")
    words[5] = str(file)
    done = subprocess.run(
        words, env=environment(tmp_path) | {"PYTHONPATH": str(ROOT)}, cwd=ROOT,
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 137, (done.stdout, done.stderr)
    assert "Process 1 failed first, with exit code 137" in done.stdout


def test_a_port_in_use_is_one_sentence(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        done = launch(tmp_path, "--port", port)
        _, errors = done.communicate(timeout=LIMIT)
    assert done.returncode == 2
    assert errors.startswith(f"error: --port is {port}, which another program")
    assert not (tmp_path / "runs").exists()
    assert set(os.listdir(tmp_path)) <= {"text.py", "__pycache__"}, "Python's own cache, if any"
