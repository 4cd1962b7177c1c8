"""What a domain is: everything that differs between runs on images, text and sounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np

from moezoo.data.source import Source
from moezoo.errors import UserError
from moezoo.tasks.base import Task
from moezoo.train.schema import Config

Batch = dict[str, Any]


class Classes(NamedTuple):
    """What a data set's labels mean, by task: how many classes, and their names.

    groups: the names of what a token's task number counts in records; None: the tasks.
    colours: of the classes of label maps, uint8 [classes,3].
    """

    counts: Mapping[str, int]
    names: Mapping[str, tuple[str, ...]]
    groups: tuple[str, ...] | None = None
    colours: Mapping[str, np.ndarray] = MappingProxyType({})


def classes_of(source: Source) -> dict[str, int]:
    """How many classes the data set's label maps have, for the tasks that have classes."""
    return {task: labels.classes for task, labels in source.info.labels.items()}


def colours_of(source: Source) -> dict[str, np.ndarray]:
    """The colours of those classes, uint8 [classes,3] each."""
    return {task: labels.palette for task, labels in source.info.labels.items()}


def class_names_of(source: Source) -> dict[str, tuple[str, ...]]:
    """The names of those classes."""
    return {task: labels.names for task, labels in source.info.labels.items()}


class Domain(Protocol):
    """Images, text or sounds.

    unit: what examples are called.   kind: the same for what a run is "on".   validated: whether
    there is a split besides `test` to look at on the way.
    """

    unit: str
    kind: str
    validated: bool

    def check(self, config: Config) -> None:
        """Raise UserError where the `data` section has no meaning."""
        ...

    def open(self, config: Config, split: str) -> Any:
        """The `train` or `test` split, or `valid` where there is one: a source with a length."""
        ...

    def classes(self, source: Any) -> Classes:
        """What the source's labels mean."""
        ...

    def size(self, config: Config) -> tuple[int, int]:
        """The size that a model is built for."""
        ...

    def example(self, config: Config) -> tuple[Batch, Classes]:
        """A training batch of one example in the configured form; needs no archive."""
        ...

    def training(
        self, config: Config, source: Any, tasks: Sequence[str], start: int, rows: range
    ) -> Iterator[tuple[int, Batch]]:
        """(step, this process's rows of the batch) from `start` to the end of the run."""
        ...

    def evaluation(
        self, source: Any, count: int, size: int, names: Sequence[str], rows: range
    ) -> Iterator[Batch]:
        """The first `count` examples once, with `valid`."""
        ...

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for a batch; options are `key` and `train`."""
        ...

    def check_labels(self, tasks: Sequence[Task], source: Any) -> None:
        """UserError for a task that the source has no labels or no truth for."""
        ...

    def describe(self, config: Config) -> str:
        """The form of an example, in words."""
        ...


def check_tasks_of(tasks: Sequence[Task], source: Source) -> None:
    """UserError for a task that the data set has no labels for, or labels of another kind."""
    info = source.info
    for task in tasks:
        if task.name not in info.tasks:
            raise UserError(
                f"{info.name} has no labels for task {task.name}: take --tasks from "
                f"{', '.join(info.tasks)}."
            )
        if task.label != info.kinds[task.name]:
            raise UserError(
                f"Task {task.name} reads labels that are {task.label}, but {info.name} declares "
                f"{info.kinds[task.name]}: correct one of them."
            )
