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
from pathlib import Path

MB, GB = 10**6, 10**9

Raised = Callable[[str], Exception]
_KINDS = (
    (stat.S_ISDIR, "is a folder, not a file"),
    (stat.S_ISFIFO, "is a named pipe, not a regular file"),
    (stat.S_ISSOCK, "is a socket, not a regular file"),
    (stat.S_ISCHR, "is a device, not a regular file"),
    (stat.S_ISBLK, "is a device, not a regular file"),
)


def check(path: str | Path, most: int, error: Raised, advice: str = "") -> int:
    """The size in bytes of a regular file that can be read and has at most `most` bytes.

    Links count as what they point to. Raises `error(sentence)` for anything else; `advice` says
    what to do about it and ends the sentence. Never waits, whatever the path is.
    """
    size, file = _open(path, most, error, advice)
    os.close(file)
    return size


def read(path: str | Path, most: int, error: Raised, advice: str = "") -> bytes:
    """The bytes of a regular file; raises as `check` does, also where it grows meanwhile."""
    _, file = _open(path, most, error, advice)
    try:
        with open(file, "rb") as opened:
            found = opened.read(most + 1)
    except OSError as trouble:
        raise error(_sentence(path, _refused(trouble), advice)) from trouble
    if len(found) > most:
        raise error(_sentence(path, _large(len(found), most), advice))
    return found


def _open(path: str | Path, most: int, error: Raised, advice: str) -> tuple[int, int]:
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
    except FileNotFoundError as trouble:
        raise error(_sentence(path, "is missing", advice)) from trouble
    except (OSError, ValueError) as trouble:  # ValueError: a name with a null character
        raise error(_sentence(path, _refused(trouble), advice)) from trouble
    raise error(_sentence(path, wrong, advice))


def _wrong(about: os.stat_result, most: int) -> str | None:
    for is_kind, words in _KINDS:
        if is_kind(about.st_mode):
            return words
    return _large(about.st_size, most) if about.st_size > most else None


def _large(size: int, most: int) -> str:
    return f"has {size / MB:,.1f} MB, and at most {most / MB:,.1f} MB are read"


def _refused(trouble: OSError | ValueError) -> str:
    return f"cannot be read ({getattr(trouble, 'strerror', None) or trouble})"


def _sentence(path: str | Path, wrong: str, advice: str) -> str:
    return f"'{path}' {wrong}{': ' if advice else ''}{advice}."
