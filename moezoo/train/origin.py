"""The configuration file that a run came from, and running it again where the run is read.

A file may define what its configuration names: a model, a data set, tasks. A run's folder keeps

    origin.json   where the file lay, and its checksum
    config.py     a copy of it

To read such a run the file has to be run again. That is done without being asked for the file at
its old place only, and only while it is what it was: code that its owner has run before. Code that
came with a run's folder is never run by itself: who trusts it names it in $MOEZOO_OWN_CODE.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from shlex import quote
from typing import Any

import jax

from moezoo import registry, regular
from moezoo import schema_check as check
from moezoo.errors import UserError
from moezoo.files import write_atomically
from moezoo.train import config_file, config_json, sealed

ORIGIN, COPY = "origin.json", "config.py"
OWN_CODE = "MOEZOO_OWN_CODE"
FORM = check.table({"file": check.text(), "sha256": check.text()}, required=("file", "sha256"))


def record(directory: Path, file: Path) -> str | None:
    """Keep in a run's folder which configuration file it came from, and a copy of that.

    Returns a sentence where the file was another one before.
    """
    code = regular.read(file, regular.MB, UserError, "name a Python file.")
    held = {"file": str(file.resolve()), "sha256": hashlib.sha256(code).hexdigest()}
    before = _held(directory)
    write_atomically(directory / COPY, code)
    write_atomically(directory / ORIGIN, sealed.seal(held))
    if before is None or before["sha256"] == held["sha256"]:
        return None
    return f"{file} has changed since {directory} was begun: it goes on with what is there now."


def kept(run: Path) -> dict[str, bytes]:
    """What `record` keeps in a run's folder, by name; nothing where it came from no file."""
    held = (name for name in (ORIGIN, COPY) if (run / name).is_file())
    return {name: regular.read(run / name, regular.MB, UserError) for name in held}


def of_package(run: Path) -> bool:
    """Whether a run came from one of the package's own configurations."""
    held = _held(run)
    package = Path(registry.__file__).resolve().parent
    return held is not None and package in Path(held["file"]).parents


def keep(directory: Path, file: Path | None, say: Callable[[str], None]) -> None:
    """`record` of process 0, where there is a file; says what it has to tell."""
    if file is not None and jax.process_index() == 0:
        told = record(directory, file)
        if told is not None:
            say(told)


def prepare(run: Path, text: str) -> None:
    """Make known what a run's configuration names and only its own file defines.

    `text` is the configuration as JSON. Where it names nothing unknown, no code runs. Otherwise
    says on stderr which file is run. Raises UserError where there is none that may be.
    """
    for file in _trusted():
        if not _unknown(text):
            return
        _run(run, file)
    names = _unknown(text)
    if names:
        _run(run, _own_file(run, names))


def _run(run: Path, file: Path) -> None:
    print(f"{run} is made of what {file} defines: running that file.", file=sys.stderr)
    config_file.read(file)


def _unknown(text: str) -> list[str]:
    """What a configuration names and nobody here knows, in words."""
    try:
        values = json.loads(text)
        model, data = values["model"]["kind"], values["data"]["name"]
        wanted = [name for name in values["tasks"] if isinstance(name, str)]
    except (ValueError, KeyError, TypeError):
        return []  # `from_json` says what is wrong
    if not isinstance(model, str) or not isinstance(data, str):
        return []
    found = [] if model in registry.SYSTEMS.names else [f"the model {model}"]
    kind = config_json.data_kind(values["data"])
    if kind is None:
        return [*found, f"the data section {values['data'].get('kind')}"]
    if data not in kind.names():
        found.append(f"the data set {data}")
    tasks = kind().domain.tasks
    return found + [f"the task {name}" for name in wanted if name not in tasks]


def _trusted() -> Iterator[Path]:
    for name in filter(None, os.environ.get(OWN_CODE, "").split(os.pathsep)):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"{OWN_CODE} is {name}, but there is no such file.")
        yield file


def _own_file(run: Path, names: list[str]) -> Path:
    """The run's configuration file at its old place; UserError where it is not what it was."""
    uses = f"{run} uses {', '.join(names)}, which"
    how = f"to run code that you trust, name its file in the environment variable {OWN_CODE}"
    held = _held(run)
    if held is None:
        raise UserError(f"{uses} nobody here knows: {how}.")
    file, copy = Path(held["file"]), run / COPY
    if file.suffix != ".py" or not file.is_file() or run.resolve() in file.resolve().parents:
        state = "is not here"
    elif hashlib.sha256(code := file.read_bytes()).hexdigest() != held["sha256"]:
        state = "has changed since"
    elif not _defines_config(code):
        state = "is no configuration"
    else:
        return file
    also = f"; a copy came with the run: {OWN_CODE}={quote(str(copy))}" if copy.is_file() else ""
    raise UserError(f"{uses} {file} defined, and that file {state}: {how}{also}.")


def _defines_config(code: bytes) -> bool:
    """Whether a program, which is not run for that, gives the name `config` to something."""
    try:
        lines = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = {
        getattr(part, "asname", None) or getattr(part, "id", None) or getattr(part, "name", None)
        for line in lines
        for part in ast.walk(line)
        if isinstance(part, ast.Name | ast.alias)
    }
    return "config" in names


def _held(run: Path) -> dict[str, Any] | None:
    try:
        content = sealed.unseal(regular.read(run / ORIGIN, regular.MB, UserError))
        FORM(content, "")
    except (UserError, ValueError):
        return None
    return content
