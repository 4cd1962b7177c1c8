"""What a domain answers so that one task of a run on it can be cut out, certified and exported.

The tools of this folder ask these questions and know no domain; who answers them for a run is what
`config.data.domain.exports(config)` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from flax import nnx

from moezoo.data.source import Info, Source, SourceExample
from moezoo.deploy import task_path
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import TaskPath
from moezoo.nn import surgery
from moezoo.tasks.base import Task
from moezoo.train.domain import Classes
from moezoo.train.setup import Loaded

Cut = Callable[[Any, str, InputSpec], TaskPath]


class SeenHead(nnx.Module):
    """A head that also leaves what it reads in `seen`, under its task's name."""

    def __init__(self, head: Any, task: str, seen: dict[str, Any]):
        self.head, self.note = head, partial(seen.__setitem__, task)

    def __call__(self, x: Any, *rest: Any, **options: Any) -> Any:
        """What the head gives."""
        self.note(x)
        return self.head(x, *rest, **options)


def head_inputs(
    model: Any, batch: Any, tasks: Sequence[str], where: str = "heads"
) -> dict[str, Any]:
    """By task what its head reads: tokens [B, T, D], maps [B, h, w, D] or vectors [B, D].

    where: the path of the heads by task. Changes the model, which is used for nothing else.
    """
    seen: dict[str, Any] = {}
    for task in tasks:
        path = f"{where}/{task}"
        surgery.replace(model, path, SeenHead(surgery.get(model, path), task, seen))
    model(batch, tasks=tuple(tasks))
    return seen


@dataclass(frozen=True, eq=False)
class Subject:
    """A run's model as a function of one array, which paths are cut out of.

    model: `(batch, tasks=None)` to a `MultiTaskOutput`.   tasks: what can be cut out of it.
    cut: makes one task's whole path.   removals: the ways to reduce it to the experts of a plan, by
    what becomes of its routers (`task_path.REMOVALS`); the first one is the usual one.
    title: what a table calls the whole model.
    statements: by task what a certificate says of its path, where that is not what it says of all;
    the distance to the full model is then measured.
    counted: whether the configuration's `macs` are those of the whole model.
    features: `(model, batch, tasks)` to what each task's last layer reads.   head: where in a whole
    path the arrays lie that make a task's answer of features, by task: a short fine-tuning trains
    them besides all that is no matrix.
    """

    model: Any
    tasks: Mapping[str, Task]
    cut: Cut = task_path.task_path
    removals: Mapping[str, task_path.Remove] = field(default_factory=lambda: task_path.REMOVALS)
    title: str = "all tasks"
    statements: Mapping[str, str] = field(default_factory=dict)
    counted: bool = True
    features: Callable[[Any, Any, Sequence[str]], dict[str, Any]] = head_inputs
    head: Callable[[str], str] = "heads/{}".format


class Exporter(Protocol):
    """A domain's answers for one run; made of the run's configuration.

    input: what its paths read.
    """

    @property
    def input(self) -> InputSpec: ...

    def check(self, task: str | None) -> None:
        """Raise UserError for a task that no path of the run is about; None: all it has."""
        ...

    def open(self, split: str) -> Source:
        """The `train` or `test` examples that paths are calibrated and measured on."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """What decides which examples a split holds, JSON-able; certificates carry its hash.

        `name` in it is the data set's.
        """
        ...

    def stack(
        self, examples: Sequence[SourceExample], tasks: Sequence[str], info: Info
    ) -> dict[str, np.ndarray]:
        """A batch: what a path reads under the input's name, and labels by task."""
        ...

    def subject(self, run: Loaded, classes: Classes) -> Subject:
        """The run's model as a function of one array. classes: what its labels mean."""
        ...

    def picture(self, example: np.ndarray) -> np.ndarray:
        """One row of a batch as a picture, uint8 [height, width, 3]."""
        ...
