"""What a run takes over of another: whether it computes the same there, and whether it is enough.

Both are decided by shapes and by what configurations say of their parts
(`models.shared.config.ModelTraits`), before data are opened and before anything is compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moezoo.errors import UserError
from moezoo.models.shared.config import HeldParts, traits
from moezoo.nn.module import flatten
from moezoo.nn.upcycle import Shapes, sources
from moezoo.train import manifest, restore, saved, zoo
from moezoo.train.schema import Config

GROUPS = ("params", "stats")


def shapes_of_run(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of what a run's newest checkpoint, or a saved model, has learned, by path."""
    if zoo.holds(path):
        arrays = saved.read_arrays(path)
        return {
            name: tuple(array.shape)
            for group in GROUPS
            for name, array in flatten(arrays[group]).items()
        }
    held = manifest.read(restore.find(path, say=lambda sentence: None))
    assert held is not None  # `find` has read it
    parts = {name.partition("/")[::2]: shape for name, (shape, _) in held.arrays.items()}
    return {name: tuple(shape) for (group, name), shape in parts.items() if group in GROUPS}


def check_same(config: Config, own: Shapes, first: Config, learned: Shapes, what: str) -> None:
    """UserError where arrays that `own` takes over of `learned` would compute something else.

    own, learned: shapes by path.   first, what: the configuration that `learned` is of, and what it
    is called in messages. Parts that stay fresh may differ.
    """
    ours, theirs = traits(config.model).computes_in(), traits(first.model).computes_in()
    taken = {name for name in sources(learned, own).values() if name is not None}
    for mark in ours.keys() & theirs.keys():
        if any(mark in name for name in taken):
            check_values(ours[mark], theirs[mark], what)


def check_values(ours: Mapping[str, Any], theirs: Mapping[str, Any], what: str) -> None:
    """UserError for the first value, by its name, in which two configurations differ."""
    for name in (name for name in ours if name in theirs):
        if ours[name] != theirs[name]:
            raise UserError(
                f"{name} is {ours[name]}, but {what} has {theirs[name]}: its parameters would "
                "compute something else; take its value, or another run."
            )


def check_held(config: Config, own: Shapes, learned: Shapes, what: str) -> None:
    """UserError where parts that stand still would stay fresh, under which nothing can learn.

    own, learned, what: as of `check_same`; `learned` is empty for a bare base.
    """
    held = traits(config.model).held()
    if held is None:
        return
    source = sources(learned, own)
    fresh = [path for path in own if is_held(path, held) and source[path] is None]
    if fresh:
        some = f"{fresh[0]} {list(own[fresh[0]])}"
        more = f" (and {len(fresh) - 1} more)" if fresh[1:] else ""
        raise UserError(
            f"{config.name} holds its {held.what} still, but {what} has no {some}{more}, so they "
            f"would be fresh and nothing could be learned: --start-from must be {held.learned_by}."
        )


def is_held(path: str, held: HeldParts) -> bool:
    """Whether the array at a path is one of these parts."""
    return any(fnmatchcase(path, pattern) for pattern in held.patterns)


def check_alone(config: Config) -> None:
    """UserError for a run that begins with nothing although it holds parts still."""
    held = traits(config.model).held()
    if held is not None:
        raise UserError(
            f"{config.name} holds its {held.what} still, but begins with nothing that has learned "
            f"them: --start-from must be {held.learned_by}."
        )
