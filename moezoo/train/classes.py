"""What the labels of a data set mean, by task: how many classes, their names and colours."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from moezoo.data.source import Info
    from moezoo.tasks.registry import TaskFacts
    from moezoo.train.schema import Config


class Classes(NamedTuple):
    """What a data set's labels mean, by task: how many classes, and their names.

    groups: the names of what a token's task number counts in records; None: the tasks.
    colours: of the classes of label maps, uint8 [classes,3].
    """

    counts: Mapping[str, int] = MappingProxyType({})
    names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    groups: tuple[str, ...] | None = None
    colours: Mapping[str, np.ndarray] = MappingProxyType({})

    @classmethod
    def of(cls, info: Info) -> Classes:
        """Those of a source whose tasks have label maps or a class."""
        return cls(
            {task: labels.classes for task, labels in info.labels.items()},
            {task: labels.names for task, labels in info.labels.items()},
            colours={task: labels.palette for task, labels in info.labels.items()},
        )

    def given(self, name: str, config: Config) -> TaskFacts:
        """What a task of this name may make its settings of."""
        from moezoo.tasks.registry import TaskFacts  # needs JAX, which the rest does not

        return TaskFacts(
            name,
            config.data.name,
            config.protocol,
            config.train.class_balance,
            self.counts.get(name),
            tuple(self.names.get(name, ())),
            self.colours.get(name),
        )
