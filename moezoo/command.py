"""Typed command lines of the tools: help from docstrings, errors as one sentence."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from moezoo import storage
from moezoo.early import quiet_interrupts
from moezoo.errors import UserError

with quiet_interrupts():
    import tyro

Positional = tyro.conf.Positional
# What the tab key offers for an argument (`cli.completion`): names of the package's models.
CONFIGURATIONS, WITH_WEIGHTS = "configurations", "with weights"
ANYWHERE = "anywhere"  # a path that may be in an object store, too
A = TypeVar("A")
# Around tyro's messages, in letters for terminals without others too.
FRAME = re.compile(r"[╭╮╰╯│─┃━┏┓┗┛]+|^[+|]|[+|]$|-{4,}")


def parse(kind: type[A], arguments: Sequence[str], prog: str) -> A:
    """An instance of the dataclass `kind` from command-line words.

    `--help` prints the docstrings of `kind` and of its fields and ends the program. Raises
    UserError for words that do not fit.
    """
    if "" in arguments:  # a path of that name would be the folder where one is
        raise UserError(f"An argument of {prog} is empty: leave it out, or fill it in.")
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written):
            given = tyro.cli(kind, args=list(arguments), prog=prog)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(f"{_sentence(written.getvalue())} (see {prog} --help)") from None
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and getattr(given, field.name) == ():  # which tyro takes for a value
            raise UserError(f"Missing from {prog}: one or more {field.name} (see {prog} --help)")
        _check_paths(getattr(given, field.name), field.name)
    return _placed(kind, given)


def _placed(kind: type[A], given: A) -> A:
    """Paths of object stores as such (`storage`); UserError where an option takes local ones only.

    Those annotated WITH_WEIGHTS or ANYWHERE take both.
    """
    changed: dict[str, Any] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        value = getattr(given, name, None)
        paths = value if isinstance(value, tuple) else (value,)
        stored = [path for path in paths if isinstance(path, Path) and storage.is_stored(path)]
        if not stored:
            continue
        placed = [storage.place(path) for path in paths if path is not None]
        if not {WITH_WEIGHTS, ANYWHERE} & set(getattr(hint, "__metadata__", ())):
            raise UserError(
                f"{name} is {storage.place(stored[0])}, which only a local path can be: name one "
                "on this disk, and copy the file from or to the store."
            )
        changed[name] = tuple(placed) if isinstance(value, tuple) else placed[0]
    return dataclasses.replace(given, **changed) if changed else given  # type: ignore[type-var]


def _check_paths(value: Any, name: str) -> None:
    """UserError for a path that the system takes for too long, which even asking for it ends in."""
    for path in value if isinstance(value, tuple) else (value,):
        try:
            if isinstance(path, Path) and not storage.is_stored(path):
                os.stat(path)
        except OSError as error:  # missing, or not to be read: whoever uses it says so
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(
                    f"{name} is '{str(path)[:80]}...', which is too long for a path."
                ) from None


def _missing(panel: str) -> str | None:
    """What tyro says is missing: "Missing from PROG: --out PATH (folder to write)"; else None.

    The names of arguments stand 4 columns further in than the title, their help 8.
    """
    title, found = None, list[list[str]]()
    for line in (FRAME.sub("", line).rstrip() for line in panel.splitlines()):
        deep, text = len(line) - len(line.lstrip()), line.strip()
        if text.startswith("Missing from "):
            title = text
        elif title is None or not text:
            continue
        elif deep < 4:  # another message begins
            break
        elif deep < 8:
            found.append([text])
        elif found:
            found[-1].append(text)
    if title is None or not found:
        return None
    return f"{title} {'; '.join(_told(name, ' '.join(more)) for name, *more in found)}"


def _told(name: str, meaning: str) -> str:
    meaning = meaning.removesuffix("(required)").rstrip(". ")
    return f"{name} ({meaning[:1].lower()}{meaning[1:]})" if meaning else name


def _sentence(panel: str) -> str:
    """The gist of tyro's framed message on one line."""
    if (missing := _missing(panel)) is not None:
        return missing
    lines = [FRAME.sub(" ", line).strip() for line in panel.splitlines()]
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    text = re.sub(r"^(Parsing error|Value error|Unrecognized options|Required options) ", "", text)
    text = text.replace("{None}|", "")  # which nobody types
    text = re.sub(r"^Invalid choice (?=invalid choice)", "", text)
    text = re.split(r" For full helptext| Argument helptext| Got errors", text)[0]
    text = re.sub(r" Perhaps you meant: (--\S+).*", r"; did you mean \1?", text)
    return text.rstrip(".:; ") or "The arguments do not fit"
