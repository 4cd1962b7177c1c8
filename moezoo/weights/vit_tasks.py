"""What of pretrained weights belongs to tasks: routers, which come one per task, and heads.

A checkpoint of several tasks begins a model of some of them, in another order if need be. A single
router, as of an encoder from pre-training, begins the routers of all tasks, as in M3ViT's code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from moezoo.weights.vit_source import Shape, ViTSource

ROUTER = re.compile(r"blocks/\d+/(attn|mlp)/router/kernel")
EMBEDDINGS = ("task_embedding/fc1/kernel", "task_bias/bias")  # a row for every task
TOGETHER = "tam/"  # convolutions over all tasks' features in their order


def by_task(path: str, shape: Shape) -> bool:
    """Whether a parameter of a model, of this shape, has a first axis of tasks."""
    return path in EMBEDDINGS or (ROUTER.fullmatch(path) is not None and len(shape) == 3)


def rows(
    path: str, given: ViTSource, wanted: Mapping[str, Shape], tasks: Sequence[str]
) -> list[int]:
    """Which rows of a parameter of the weights the model's begins with; [] for all as they are.

    wanted: the shapes of the model's parameters, whose tasks these are.
    """
    if path not in wanted or not by_task(path, wanted[path]):
        return []
    if _is_single(path, given.shapes[path]):
        return [0] * wanted[path][0]
    told = given.ordered and set(tasks) <= set(given.tasks)
    told = told and given.shapes[path][:1] == (len(given.tasks),)
    return [given.tasks.index(task) for task in tasks] if told else []


def _is_single(path: str, shape: Shape) -> bool:
    return ROUTER.fullmatch(path) is not None and len(shape) == 2


def shape_of(
    path: str, given: ViTSource, wanted: Mapping[str, Shape], tasks: Sequence[str]
) -> Shape:
    """The shape of what `taken` makes of a parameter."""
    shape, chosen = given.shapes[path], rows(path, given, wanted, tasks)
    if not chosen:
        return shape
    return (len(chosen), *(shape if _is_single(path, shape) else shape[1:]))


def taken(
    path: str,
    array: np.ndarray,
    given: ViTSource,
    wanted: Mapping[str, Shape],
    tasks: Sequence[str],
) -> np.ndarray:
    """A parameter of the weights for these tasks, which may be fewer, and in another order."""
    chosen = rows(path, given, wanted, tasks)
    if not chosen:
        return array
    return (array[None] if _is_single(path, array.shape) else array)[chosen]


def in_order(given: ViTSource, wanted: Mapping[str, Shape]) -> bool:
    """Whether the model's parameters by task begin with the weights' in the order that those are
    in, because names do not tell whose they are."""
    return not (given.tasks and given.ordered) and any(
        by_task(path, wanted[path]) and given.shapes[path] == wanted[path]
        for path in given.shapes
        if path in wanted
    )


def strangers(given: ViTSource, wanted: Mapping[str, Shape], tasks: Sequence[str]) -> list[str]:
    """Parameters by task, where the weights tell that they were trained for others."""
    there, own = set(given.tasks), set(tasks)
    if not there or own == there or (given.ordered and own <= there):
        return []
    return [
        path
        for path, shape in given.shapes.items()
        if path in wanted and by_task(path, wanted[path]) and not _is_single(path, shape)
    ]


def idle_parts(
    given: ViTSource, wanted: Mapping[str, Shape], tasks: Sequence[str]
) -> tuple[str, ...]:
    """Heads, and branches between tasks, that the model has not got: taken whole or not at all."""
    own = [path for path in wanted if path.startswith(given.kind.parts)]
    parts: dict[str, bool] = {}
    for path, shape in given.shapes.items():
        if path.startswith(given.kind.parts):
            part = part_of(path)
            fits = wanted.get(path) == shape
            same = given.ordered and given.tasks == tuple(tasks)
            fits &= same or not path.startswith(TOGETHER)
            parts[part] = parts.get(part, True) and fits
    for path in own:
        if part_of(path) in parts and path not in given.shapes:
            parts[part_of(path)] = False
    return tuple(part for part, fits in parts.items() if not fits)


def part_of(path: str) -> str:
    """The head, or branch, that a parameter belongs to."""
    return "/".join(path.split("/")[:2])
