"""Files that a user names: regular ones of a bounded size, or one sentence that says why not.

Named pipes and devices hang a reader or never end, and a folder or a huge file gives a traceback
far from the name. Needs the standard library only: a copy travels in exports, whose error is
another one than that of the package, so every function is told which to raise.

    regular.check(path, most=regular.GB, error=UserError)
    text = regular.read(path, most=regular.MB, error=UserError).decode()
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

MB, GB = 10**6, 10**9

Raised = Callable[[str], Exception]
_KINDS = (
    (stat.S_ISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, "is a named pipe, not a regular file"),
    (stat.S_ISSOCK, "is a socket, not a regular file"),
    (stat.S_ISCHR, "is a device, not a regular file"),
    (stat.S_ISBLK, "is a device, not a regular file"),
)


class _Trouble(Exception):
    """What is wrong with a file, to follow its name."""


def check(path: str | Path, most: int, error: Raised, advice: str = "") -> int:
    """The size in bytes of a regular file that can be read and has at most `most` bytes.

    Links count as what they point to. Raises `error(sentence)` for anything else; `advice` says
    what to do about it and ends the sentence. Never waits, whatever the path is.
    """
    try:
        if _elsewhere(path):
            return _size_elsewhere(path, most)
        size, file = _open(path, most)
    except _Trouble as wrong:
        raise error(_sentence(path, wrong, advice)) from wrong.__cause__
    os.close(file)
    return size


def read(path: str | Path, most: int, error: Raised, advice: str = "") -> bytes:
    """The bytes of a regular file; raises as `check` does, also where it grows meanwhile."""
    try:
        if _elsewhere(path):
            _size_elsewhere(path, most)
            return path.read_bytes()  # type: ignore[union-attr]
        _, file = _open(path, most)
        with open(file, "rb") as opened:
            found = opened.read(most + 1)
        if len(found) > most:
            raise _Trouble(_large(len(found), most))
    except _Trouble as wrong:
        raise error(_sentence(path, wrong, advice)) from wrong.__cause__
    except OSError as refused:
        if _elsewhere(path):
            raise  # a store that does not answer does not say that the file is bad
        raise error(_sentence(path, _refused(refused), advice)) from refused
    return found


def trouble(path: str | Path, most: int) -> str | None:
    """What keeps `check` from accepting the file, to follow its name; None where nothing does."""
    try:
        if _elsewhere(path):
            _size_elsewhere(path, most)
            return None
        _, file = _open(path, most)
    except _Trouble as wrong:
        return str(wrong)
    os.close(file)
    return None


def _elsewhere(path: str | Path) -> bool:
    """Whether a path is no disk's but has the methods of one (`moezoo.object_path`)."""
    return isinstance(path, PurePath) and "://" in str(path)


def _size_elsewhere(path: Any, most: int) -> int:
    """The size of an object in a store, which has neither pipes nor devices.

    Raises OSError where the store does not answer: that says nothing of the file.
    """
    try:
        if path.is_dir():
            raise _Trouble("is a folder, not a file")
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise _Trouble("is missing") from error
    if size > most:
        raise _Trouble(_large(size, most))
    return size


def _open(path: str | Path, most: int) -> tuple[int, int]:
    """Size and descriptor; a device is never opened, which alone could do something to it."""
    try:
        wrong = _wrong(os.stat(path), most)
        if wrong is None:
            file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            about = os.fstat(file)
            wrong = _wrong(about, most)  # of what was opened, should the name have changed hands
            if wrong is None:
                return about.st_size, file
            os.close(file)
    except FileNotFoundError as error:
        raise _Trouble("is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a null character
        raise _Trouble(_refused(error)) from error
    raise _Trouble(wrong)


def _wrong(about: os.stat_result, most: int) -> str | None:
    for is_kind, words in _KINDS:
        if is_kind(about.st_mode):
            return words
    return _large(about.st_size, most) if about.st_size > most else None


def _large(size: int, most: int) -> str:
    return f"has {size / MB:,.1f} MB, and at most {most / MB:,.1f} MB are read"


def _refused(error: OSError | ValueError) -> str:
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _sentence(path: str | Path, wrong: object, advice: str) -> str:
    return f"'{path}' {wrong}{': ' if advice else ''}{advice}."
