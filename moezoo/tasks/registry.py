"""The tasks by name, in the order that numbers them in M3ViT's routers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from moezoo.domains.images.tasks import depth, edge, normals, parts, saliency, semseg
from moezoo.domains.pairs import tasks as similar
from moezoo.errors import UserError, unknown
from moezoo.tasks import classification, language
from moezoo.tasks.base import Task

# What is asked about a clip: the event in it, its register and room; spoken words and intents.
SOUND = ("event", "register", "room", "word", "intent", "action", "object", "location")
TASKS: dict[str, Callable[..., Task]] = {
    "semseg": semseg.task,
    "parts": parts.task,
    "saliency": saliency.task,
    "normals": normals.task,
    "edge": edge.task,
    "depth": depth.task,
    "scene": classification.task,
    "lm": language.task,
    **{name: partial(classification.whole, name) for name in SOUND},
    **{name: make for name, make in similar.TASKS.items() if name != "scene"},
}


def names() -> tuple[str, ...]:
    """All task names; enabled tasks are numbered in this order."""
    return tuple(TASKS)


def in_order(chosen: Iterable[str]) -> tuple[str, ...]:
    """The chosen names in the registry's order, each once; UserError for an unknown one."""
    wanted = set(chosen)
    for name in sorted(wanted - set(TASKS)):
        raise unknown("task", name, list(TASKS))
    return tuple(name for name in TASKS if name in wanted)


def build(name: str, kinds: Mapping[str, Callable[..., Task]] = TASKS, **settings: Any) -> Task:
    """The task with this name; settings are the keyword arguments of its file's `task` function.

    kinds: `similar.TASKS` where candidates are compared; there "scene" is another function.
    Raises UserError for an unknown task, an unknown setting or a required one that is missing.
    """
    if name not in kinds:
        raise unknown("task", name, list(kinds))
    parameters = inspect.signature(kinds[name]).parameters
    for key in settings:
        if key not in parameters:
            raise unknown(f"setting of task {name}", key, list(parameters))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise UserError(f"Task '{name}' needs the setting '{key}'.")
    return kinds[name](**settings)
