"""Files that a user names are regular and of a bounded size, or refused at once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from moezoo import regular
from moezoo.errors import UserError
from tests.robustness import fuzz


class Other(Exception):
    """As exports have one of their own."""


def _folder(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _large(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 * regular.GB)


def _nothing(path: Path) -> None:
    """The file is missing."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_folder, "is a folder, not a file"),
        (_pipe, "is a named pipe, not a regular file"),
        (_socket, "is a socket, not a regular file"),
        (_zeros, "is a device, not a regular file"),
        (_loop, r"cannot be read \(Too many levels of symbolic links\)"),
        (_large, "has 3,000.0 MB, and at most 1.0 MB are read"),
        (_nothing, "is missing"),
    ],
)
@pytest.mark.parametrize("use", [regular.check, regular.read])
def test_what_is_no_file_is_refused_at_once(
    make: Callable[[Path], None], words: str, use: Callable[..., object], tmp_path: Path
) -> None:
    make(path := tmp_path / "given")
    with fuzz.limit(5), pytest.raises(UserError, match=f"given' {words}: try again.$"):
        use(path, regular.MB, UserError, "try again")


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, ""])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(Other, match="^'.*' (cannot be read|is missing).*\\.$"):
        regular.check(name, 1, Other)


def test_regular_files_and_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("file", "link"):
        assert regular.check(tmp_path / name, 5, UserError) == 5
        assert regular.read(str(tmp_path / name), 5, UserError) == b"12345"
    with pytest.raises(UserError, match="at most"):
        regular.read(tmp_path / "link", 4, UserError)


def test_files_that_tell_no_size(tmp_path: Path) -> None:
    """Those of /proc are regular, have 0 bytes by name, and more when they are read."""
    path = Path("/proc/self/status")
    if not path.is_file():
        pytest.skip("this system has no /proc")
    assert regular.check(path, 10, UserError) == 0
    with pytest.raises(UserError, match="at most"):
        regular.read(path, 10, UserError)
