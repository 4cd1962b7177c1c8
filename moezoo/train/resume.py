"""Which configurations may go on in a run's folder.

What changes no numbers may change at any time, and a run may be given more steps. Everything else
changes only where `train.py --resume FOLDER --section.option VALUE` names it; the run's folder
keeps what was changed after which step (`run_folder`).

The learning rate follows its schedule over the new number of steps from there on: a run that was
given more steps on the way is not the run that had them from the start, unless its rate is
constant.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import jax

from moezoo import fields, storage
from moezoo.errors import UserError
from moezoo.files import check_writable
from moezoo.train import overrides, run_folder
from moezoo.train.config import Config, from_json, to_json
from moezoo.train.log import NAME, read
from moezoo.train.restore import FOLDER

# What may change between parts of one run without changing what it computes.
FREE = (
    "name", "directory", "data.data_dir", "mesh", "hosts", "log", "checkpoint", "evaluate",
    "train.log_every", "train.nonfinite_steps", "train.rematerialise", "optimiser.split",
)  # fmt: skip
STEPS = "train.steps"
Changed = dict[str, tuple[Any, Any]]


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by names such as train.batch."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}.{key}" if prefix else key)
    return flat


def differences(before: str, after: str, free: Sequence[str] = FREE) -> Changed:
    """The settings in which two JSON configurations differ, but for those in `free`."""
    left, right = flattened(json.loads(before)), flattened(json.loads(after))
    return {
        name: (left.get(name), right.get(name))
        for name in [*left, *(n for n in right if n not in left)]
        if left.get(name) != right.get(name)
        and not any(name == one or name.startswith(f"{one}.") for one in free)
    }


def trained(directory: Path) -> bool:
    """Whether a run has come as far as its first measurement or checkpoint."""
    checkpoints = directory / FOLDER
    return (directory / NAME).exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))


def finished(directory: Path, steps: int) -> bool:
    """Whether a run has its scores after the last of so many steps."""
    rows = read(directory / NAME) if (directory / NAME).exists() else []
    return any(row["split"] == "test" and row["step"] == steps for row in rows)


def split(arguments: Sequence[str]) -> tuple[str | None, Path | None, list[str]]:
    """A command line's configuration, folder of `--resume` and overrides.

    Raises UserError for both together, `--resume` twice or without a folder.
    """
    words, folders = list(arguments), []
    name = words.pop(0) if words and not words[0].startswith("-") else None
    while at := next((i for i, w in enumerate(words, 1) if w.split("=")[0] == "--resume"), 0):
        given = words.pop(at - 1).partition("=")
        if not given[1] and (at > len(words) or words[at - 1].startswith("--")):
            raise UserError("--resume needs the folder of a run: train.py --resume runs/NAME.")
        folders.append(given[2] if given[1] else words.pop(at - 1))
    if "" in folders:
        raise UserError("--resume needs the folder of a run: train.py --resume runs/NAME.")
    if len(folders) > 1:
        raise UserError(f"--resume is given twice, {folders[0]} and {folders[1]}: name one run.")
    if folders and name is not None:
        raise UserError(
            f"--resume takes the run's own configuration, so {name} cannot be given, too: leave "
            "one of them out."
        )
    return name, storage.place(folders[0]) if folders else None, words


def continued(folder: Path, words: Sequence[str]) -> tuple[Config, frozenset[str]]:
    """The configuration of the run in a folder with overrides, and which settings these change.

    The folder may have been moved or renamed. Raises UserError where it is no run's, and for
    overrides that make no sense in a run that has begun.
    """
    fields.check_value(fields.FilePath, str(folder), "The folder of --resume")
    # Its name becomes the run's: a link's own, but none of `..`.
    folder = folder.resolve() if ".." in folder.parts else folder.absolute()
    if not folder.is_dir():
        raise UserError(f"--resume {folder}: there is no such folder; name that of a run.")
    stored = run_folder.load_config(folder)
    parts = Path(stored.name).parts
    if folder.parts[-len(parts) :] != parts:
        parts = (folder.name,)
    stored = replace(
        stored,
        name="/".join(parts),
        directory=str(folder.parents[len(parts) - 1]),
        checkpoint=replace(stored.checkpoint, resume="always"),
    )
    summary = f"Go on with the run in {folder}. The defaults are its own configuration."
    config = overrides.parse(stored, words, f"train.py --resume {quote(str(folder))}", summary)
    for name in ("name", "directory", "start_from", "start_heads", "start_without", "upcycle"):
        if getattr(config, name) != getattr(stored, name):
            raise UserError(
                f"--resume goes on with the run in {folder}, so --{name} cannot be given: leave it "
                "out, or train a new run with --start-from."
            )
    return config, frozenset(differences(to_json(stored), to_json(config)))


def _completed(text: str) -> str:
    """A configuration with the fields that it lacks because its version had none of them."""
    try:
        return to_json(from_json(text))
    except UserError:  # of another system altogether; `differences` names what differs
        return text


def check_same_run(
    config: Config, directory: Path, explicit: Collection[str] = frozenset()
) -> Changed:
    """Write config.json into a new run folder, or say how the run in it changes.

    `explicit` are the settings that may change besides those that always may. A folder whose run
    failed before it began to train is as good as new.

    Raises UserError where the folder cannot be written, or holds a run of another configuration.
    """
    if jax.process_index() == 0:
        check_writable(directory)
    if not (directory / run_folder.CONFIG).exists() or not trained(directory):
        if jax.process_index() == 0:
            run_folder.write_config(directory, config)
        return {}
    changed = differences(_completed(run_folder.read_config(directory)), to_json(config))
    if config.checkpoint.resume == "never":
        raise UserError(
            f"{directory} holds a run already and checkpoint.resume is never: "
            f"choose another --name or delete the folder."
        )
    for name, (there, here) in changed.items():
        more = name == STEPS and isinstance(there, int) and here > there
        if name not in explicit and not more:
            raise UserError(
                f"{directory} holds a run with {name} = {there}, not {here}: choose another "
                f"--name, delete the folder{_or_resume(directory, name, here)}."
            )
    return changed


def _or_resume(directory: Path, name: str, value: Any) -> str:
    # Other models and other data have no place for what was trained.
    if name == "tasks" or name.startswith(("start_", "model.", "data.")):
        return ""
    words = " ".join(quote(str(v)) for v in (value if isinstance(value, list) else [value]))
    return f", or go on with it: train.py --resume {quote(str(directory))} --{name} {words}"


def told(step: int, changed: Mapping[str, tuple[Any, Any]], schedule: str) -> list[str]:
    """Sentences about what changes from `step` on."""
    lines = [
        f"From step {step} on {name} is {after}, before it was {before}."
        for name, (before, after) in changed.items()
    ]
    if STEPS in changed and schedule != "constant":
        lines.append(
            f"The learning rate goes on along its {schedule} schedule over the new number of "
            "steps, so this is not the run that had them from the start."
        )
    return lines
