"""Processes and threads work on a folder in turn."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moezoo import folder_lock
from moezoo.folder_lock import alone_in


def test_others_wait_and_say_so(tmp_path: Path, capsys: Any) -> None:
    done: list[str] = []

    def second() -> None:
        with alone_in(tmp_path, "waiting for the first"):
            done.append("second")

    with alone_in(tmp_path, "nobody waits"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        done.append("first")
    thread.join()
    assert done == ["first", "second"]
    assert capsys.readouterr().err == "waiting for the first\n"


@pytest.mark.parametrize("code", folder_lock.NO_LOCKS)
def test_storage_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*given: object) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with alone_in(tmp_path, ""):
        pass


def test_other_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"):
        with alone_in(tmp_path, ""):
            pytest.fail("without a lock")
    with pytest.raises(FileNotFoundError):
        with alone_in(tmp_path / "none", ""):
            pytest.fail("no folder")
