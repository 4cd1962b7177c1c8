"""The configuration that stands in a run's folder, and what was changed on the way.

config.json    the run's configuration as it goes on now, with a checksum of its own
changes.json   settings that were changed after the run had begun, and after which step
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moezoo import schema_check as check
from moezoo import storage
from moezoo.errors import UserError
from moezoo.files import write_atomically
from moezoo.train import lock, origin, restore, sealed
from moezoo.train.config_json import from_json, to_json
from moezoo.train.schema import Config

CONFIG, CHANGES = "config.json", "changes.json"


class Change(NamedTuple):
    """A setting that was changed after `step` updates."""

    step: int
    option: str
    before: Any
    after: Any


FORM = check.table(
    {
        "changes": check.list_of(
            check.table(
                {"step": check.whole(), "option": check.text()},
                required=Change._fields,
                others=lambda value, place: None,
            )
        )
    },
    required=("changes",),
)


def write_config(directory: Path, config: Config) -> None:
    """Put the configuration into the run's folder, unless it stands there already."""
    path = directory / CONFIG
    text = sealed.seal(json.loads(to_json(config)))
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomically(path, text)


def discard(directory: Path) -> None:
    """Remove what a run that was refused has left in a folder that was made for it."""
    if storage.is_stored(directory):
        return
    for name in (CONFIG, CHANGES, origin.ORIGIN, origin.COPY, lock.NAME):
        with contextlib.suppress(OSError):  # absent, or a disk that lets nothing be written
            (directory / name).unlink()
    for folder in (directory / restore.FOLDER, directory):
        with contextlib.suppress(OSError):  # absent, or it holds what is not ours
            folder.rmdir()


def read_config(directory: Path) -> str:
    """The run's configuration as JSON text; where it is damaged, that of its newest checkpoint.

    Raises UserError where the folder has neither.
    """
    path = directory / CONFIG
    trouble = _trouble(path)
    if trouble is None:
        return json.dumps(sealed.read(path))
    try:
        return to_json(restore.read_config(directory))
    except UserError as error:
        raise UserError(
            f"{path} {trouble}, and there is no sound checkpoint that has it, too: choose another "
            "--name, or delete the folder."
        ) from error


def _trouble(path: Path) -> str | None:
    """Why a configuration cannot be taken from its file, if so."""
    try:
        sealed.read(path)
    except sealed.DamagedSeal as damage:
        return "is missing" if not path.exists() else f"is damaged ({damage})"
    return None


def load_config(directory: Path) -> Config:
    """`read_config` as a configuration.

    Raises UserError, besides, for a folder that is no run's.
    """
    if directory.name.isdigit() and directory.parent.name == restore.FOLDER:
        raise UserError(
            f"{directory} is a checkpoint: name the run's folder, {directory.parent.parent}."
        )
    if not (directory / CONFIG).exists() and not (directory / restore.FOLDER).is_dir():
        raise UserError(f"{directory} is no run's folder: it has no {CONFIG}.")
    text, trouble = read_config(directory), _trouble(directory / CONFIG)
    if trouble is not None:
        print(
            f"{directory / CONFIG} {trouble}: the configuration of the newest checkpoint is taken.",
            file=sys.stderr,
        )
    origin.prepare(directory, text)
    return from_json(text)


def changes(directory: Path) -> list[Change]:
    """What was changed on the way, oldest first; nothing where that file is damaged."""
    try:
        content = sealed.read(directory / CHANGES)
        FORM(content, "")
    except ValueError:
        return []
    return [Change(**{name: row[name] for name in Change._fields}) for row in content["changes"]]


def record(
    directory: Path, config: Config, step: int, changed: Mapping[str, tuple[Any, Any]]
) -> None:
    """Note that the run goes on from `step` with this configuration.

    `changed` maps options to their values before and after. What was changed at later steps, in a
    part of the run that is repeated, counts from here; a run that begins anew has no changes.
    """
    new = [Change(step, name, *values) for name, values in changed.items()]
    rows = [c._replace(step=min(c.step, step)) for c in changes(directory)] + new if step else []
    if rows:
        text = sealed.seal({"changes": [row._asdict() for row in rows]})
        write_atomically(directory / CHANGES, text)
    else:
        (directory / CHANGES).unlink(missing_ok=True)
    write_config(directory, config)
