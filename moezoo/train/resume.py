"""Whether a run folder belongs to the configuration that wants to continue in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from moezoo.errors import UserError
from moezoo.train.config import Config, from_json, to_json
from moezoo.train.files import check_writable, failure, write_atomically
from moezoo.train.log import NAME, read
from moezoo.train.restore import FOLDER

# What may change between parts of one run without changing what it computes.
FREE = ("mesh", "hosts", "log", "checkpoint", "evaluate", "directory", "data/data_dir")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}/{key}" if prefix else key)
    return flat


def difference(here: str, there: str, free: Sequence[str] = FREE) -> tuple[str, Any, Any] | None:
    """The first setting that differs between two JSON configurations: (name, here, there).

    Those in `free` are not compared.
    """
    left, right = _flat(json.loads(here)), _flat(json.loads(there))
    for name in [*left, *(n for n in right if n not in left)]:
        if any(name == one or name.startswith(f"{one}/") for one in free):
            continue
        if left.get(name) != right.get(name):
            return name.replace("/", "."), left.get(name), right.get(name)
    return None


def trained(directory: Path) -> bool:
    """Whether a run has come as far as its first measurement or checkpoint."""
    checkpoints = directory / FOLDER
    return (directory / NAME).exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def finished(directory: Path, steps: int) -> bool:
    """Whether a run has its scores after the last of so many steps."""
    rows = read(directory / NAME) if (directory / NAME).exists() else []
    return any(row["split"] == "test" and row["step"] == steps for row in rows)


def _completed(text: str) -> str:
    """A configuration with the fields that it lacks because its version had none of them."""
    try:
        return to_json(from_json(text))
    except UserError:  # of another system altogether; `difference` names what differs
        return text


def check_same_run(config: Config, directory: Path) -> None:
    """Write config.json into a new run folder, or check that it is the same run's.

    A folder whose run failed before it began to train is as good as new.

    Raises UserError where the folder cannot be written, or holds a run of another configuration.
    """
    path = directory / "config.json"
    text = to_json(config)
    if jax.process_index() == 0:
        check_writable(directory)
    if not path.exists() or not trained(directory):
        if jax.process_index() == 0:
            write_atomically(path, text)
        return
    try:
        changed = difference(text, _completed(path.read_text()))
    except OSError as error:
        raise failure("read", path, error) from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); choose another --name.") from error
    if config.checkpoint.resume == "never":
        raise UserError(
            f"{directory} holds a run already and checkpoint.resume is never: "
            f"choose another --name or delete the folder."
        )
    if changed is not None:
        name, here, there = changed
        raise UserError(
            f"{directory} holds a run with {name} = {there}, not {here}: choose another --name "
            f"or delete the folder."
        )
