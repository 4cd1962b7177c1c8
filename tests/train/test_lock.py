"""One run at a time in a folder."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moezoo.errors import UserError
from moezoo.train import lock
from moezoo.train.lock import locked
from tests.fixtures import ROOT

HOLD = """
import sys, time
from pathlib import Path
from moezoo.train.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    other = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid} on .*--name"):
            with locked(tmp_path):
                pytest.fail("two at once")
    finally:
        other.kill()
        other.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
    with locked(tmp_path):
        pass


def test_one_process_does_not_take_it_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run"), pytest.raises(UserError, match=f"by process {os.getpid()}"):
        with locked(tmp_path / "link"):
            pytest.fail("two at once")


@pytest.mark.parametrize("content", ["", "{", "[1]", "\x00", '{"host": "far", "process": 7}'])
def test_what_a_killed_run_left_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / lock.NAME).write_text(content)
    said: list[str] = []
    with locked(tmp_path, said.append):
        pass
    assert len(said) == ("far" in content)
    assert not said or "Process 7 on far had" in said[0]


def test_storage_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    said: list[str] = []
    with locked(tmp_path, said.append):
        pass
    assert said == [f"The storage of {tmp_path} has no locks: do not start this run twice."]


def test_a_folder_that_cannot_be_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Could not write to"):
        with locked(tmp_path / "file" / "run"):
            pytest.fail("no folder")
