"""What comes with the package, by name: configurations and weights; and what a saved model says.

Nothing here needs JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo import regular, storage
from moezoo import schema_check as check
from moezoo.errors import UserError
from moezoo.train.classes import Classes

CONFIG, WEIGHTS, ABOUT = "config.json", "weights.safetensors", "model.json"
FORMAT = 1
ZOO = Path(__file__).resolve().parents[1] / "zoo"
CONFIGS = Path(__file__).resolve().parents[1] / "configs"  # in a clone a link
AGAIN = "save it again, or name another folder"
ABOUT_FORM = check.table(
    {
        "format": check.whole(1, 2**31 - 1),
        "step": check.whole(),
        "origin": check.line(),
        "class_counts": check.map_of(check.whole(1)),
        "class_names": check.map_of(check.list_of(check.line(200))),
        "groups": check.maybe(check.list_of(check.line(200))),
        "colours": check.map_of(check.list_of(check.text(7, "#[0-9a-f]{6}"))),
        "scores": check.map_of(check.map_of(check.number())),
        "facts": check.map_of(check.line()),
        "sha256": check.map_of(check.text(64, "[0-9a-f]{64}")),
    },
    required=("format", "step", "origin", "class_counts", "class_names", "groups", "sha256"),
    others=check.refused,
)


class About(NamedTuple):
    """What is known about a saved model besides its configuration and its arrays.

    step: of its training.   origin: where its weights come from, in words.   classes: what the
    labels of its tasks mean.   scores: on its test data, by task and name.   facts: whatever else
    its card says, by name: command, hardware, licence.
    """

    step: int
    origin: str
    classes: Classes = Classes()
    scores: Mapping[str, Mapping[str, float]] = {}
    facts: Mapping[str, str] = {}


def names() -> tuple[str, ...]:
    """The models that come with the package, by the names of their configurations."""
    found = sorted(ZOO.rglob(ABOUT)) if ZOO.is_dir() else []
    return tuple(file.parent.relative_to(ZOO).as_posix() for file in found)


def located(path: Path | str) -> Path:
    """A path as it is where something lies there, else that of the package's model of this name.

    What a store holds besides runs, which are read where they are, comes as a copy on this disk.
    """
    path = storage.place(path)
    if storage.is_stored(path):
        return path if _is_run(path) else storage.local(path)
    if not path.is_absolute() and not path.exists() and holds(ZOO / path):
        return ZOO / path
    return path


def without_weights(name: Path | str) -> str | None:
    """What to say of the name of a configuration with which no weights come; None: it is none."""
    try:
        if not (CONFIGS / f"{name}.py").is_file():
            return None
    except OSError:  # too long for a name
        return None
    return f"No weights come with {name}: train it (moezoo train {name}), and name its run."


def _is_run(path: Path) -> bool:
    """Whether a folder in a store is a run's, its folder of checkpoints or a checkpoint."""
    if path.name == "checkpoints" or (path / "metrics.jsonl").is_file():
        return True
    return any((path / name).is_dir() for name in ("checkpoints", "arrays"))


def holds(path: Path | str) -> bool:
    """Whether a folder is one of a saved model."""
    path = storage.place(path)
    return (path / ABOUT).is_file() and (path / WEIGHTS).is_file()


def stored(about: About) -> dict[str, Any]:
    """The form of `model.json`, without checksums."""
    classes = about.classes
    return {
        "format": FORMAT,
        "step": about.step,
        "origin": about.origin,
        "class_counts": dict(classes.counts),
        "class_names": {task: list(found) for task, found in classes.names.items()},
        "groups": None if classes.groups is None else list(classes.groups),
        "colours": {
            task: [f"#{bytes(colour).hex()}" for colour in np.asarray(found, np.uint8)]
            for task, found in classes.colours.items()
        },
        "scores": {task: dict(found) for task, found in about.scores.items()},
        "facts": dict(about.facts),
    }


def read_about(folder: Path | str) -> About:
    """What a folder says about its model; UserError where that is damaged or of a later version."""
    file = storage.place(folder) / ABOUT
    content = regular.read(file, 64 * regular.MB, UserError, AGAIN)
    try:
        found = check.parse(content)
        version = found.get("format") if isinstance(found, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise UserError(
                f"{file} has format {version}, this version of moezoo reads {FORMAT}: update it."
            )
        ABOUT_FORM(found, "")
    except check.FormatFault as error:
        raise UserError(f"{file} is damaged ({error}): {AGAIN}.") from error
    groups = None if found["groups"] is None else tuple(found["groups"])
    classes = Classes(
        found["class_counts"],
        {task: tuple(n) for task, n in found["class_names"].items()},
        groups,
        {task: _colours(written) for task, written in found.get("colours", {}).items()},
    )
    _check_classes(file, classes)
    facts = found.get("facts", {})
    return About(found["step"], found["origin"], classes, found.get("scores", {}), facts)


def _check_classes(file: Path, classes: Classes) -> None:
    """UserError where names or colours are not as many as the classes."""
    for what, table in (("class_names", classes.names), ("colours", classes.colours)):
        for task, given in table.items():
            count = classes.counts.get(task)
            # Names may be those of what rows are numbered by, which are no classes.
            if count is not None and len(given) != count and not _are_groups(given, classes):
                raise UserError(
                    f"{file} is damaged ({what}.{task} has {len(given)} entries, there are {count} "
                    f"classes): {AGAIN}."
                )


def _are_groups(given: Any, classes: Classes) -> bool:
    return isinstance(given, tuple) and given == classes.groups


def _colours(written: list[str]) -> np.ndarray:
    """uint8 [classes, 3] of "#f25c5c" and the like."""
    rows = [np.frombuffer(bytes.fromhex(one[1:]), np.uint8) for one in written]
    return np.stack(rows) if rows else np.zeros((0, 3), np.uint8)
