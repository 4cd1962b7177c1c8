"""Typed command lines of the tools: help from docstrings, errors as one sentence."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

from moezoo.errors import UserError

A = TypeVar("A")
FRAME = re.compile(r"[╭╮╰╯│─┃━┏┓┗┛]+")


def parse(kind: type[A], arguments: Sequence[str], prog: str) -> A:
    """An instance of the dataclass `kind` from command-line words.

    `--help` prints the docstrings of `kind` and of its fields and ends the program. Raises
    UserError for words that do not fit.
    """
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            return tyro.cli(kind, args=list(arguments), prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_sentence(written.getvalue())} (see {prog} --help)") from None


def restart_with_huge_pages() -> None:
    """Replace this process by the same program with glibc asking for huge pages.

    XLA on a CPU takes and returns large buffers in every step; faulting them in page by page was a
    quarter of the time of a training step. glibc reads the setting when a process starts. Nothing
    happens off Linux and where GLIBC_TUNABLES is set, by the user or by this.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _sentence(panel: str) -> str:
    """The gist of tyro's framed message on one line."""
    lines = [FRAME.sub(" ", line).strip() for line in panel.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    text = re.sub(r"^(Parsing error|Value error|Unrecognized options|Required options) ", "", text)
    text = re.split(r" For full helptext| Argument helptext| Got errors", text)[0]
    text = re.sub(r" Perhaps you meant: (--\S+).*", r"; did you mean \1?", text)
    return text.rstrip(".:; ") or "The arguments do not fit"
