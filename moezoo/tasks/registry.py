"""Tables of tasks by name, and making the tasks of a run from one.

Every domain has its table; the order of the table numbers tasks in routers. Adding a task means
adding its file and one line in the table:

    "depth": TaskKind(depth.task),
    "edge": TaskKind(edge.task, edge.settings),
"""

from __future__ import annotations

import inspect
import re
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from moezoo.errors import UserError, unknown
from moezoo.tasks.base import Task


class TaskFacts(NamedTuple):
    """The facts about a run that a task's settings may depend on.

    name: the task's.   count, names, colours: the data set's classes for it, if it has any;
    colours uint8 [classes,3].   data: the data set's name.   protocol: the configuration's section
    of that name.   class_balance: `train.class_balance`.   groups: the names by which tokens are
    numbered.
    """

    name: str
    data: str
    protocol: Any
    class_balance: float = 0.0
    count: int | None = None
    names: tuple[str, ...] = ()
    colours: np.ndarray | None = None
    groups: tuple[str, ...] = ()

    def classes(self) -> dict[str, Any]:
        """The setting `classes`, if the data set says how many there are."""
        return {} if self.count is None else {"classes": self.count}


def no_settings(given: TaskFacts) -> dict[str, Any]:
    """The settings of a task that do not depend on the run."""
    return {}


class TaskKind(NamedTuple):
    """How a task of this name is made: `task(**settings)`, and which settings a run gives it."""

    task: Callable[..., Task]
    settings: Callable[[TaskFacts], dict[str, Any]] = no_settings


NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def check_table(table: Mapping[str, TaskKind], what: str) -> None:
    """UserError for an entry that is no `TaskKind`, or whose name is none of a task.

    what: whose table it is, for the message.
    """
    for name, kind in table.items():
        # Names of tasks become names of parameters, files, options and columns.
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(
                f"{what} has a task called {name!r:.80}: a name is up to 64 letters, digits, _, -."
            )
        if not isinstance(kind, TaskKind):
            raise UserError(
                f"{what} has {kind!r:.80} for the task {name}: give "
                f'TASKS["{name}"] = TaskKind(function), where function(...) returns a Task.'
            )


class TaskTable(UserDict[str, TaskKind]):
    """A table whose first entries cannot be replaced or removed; further ones can be added.

    A run is told by the names of its tasks. If a configuration file could give such a name another
    meaning, programs that read the run without running that file would take the old meaning.
    """

    def __init__(self, kinds: Mapping[str, TaskKind]):
        self.data, self.fixed = dict(kinds), frozenset(kinds)

    def __setitem__(self, name: str, kind: TaskKind) -> None:
        if name in self.fixed and kind is not self.data[name]:
            raise UserError(
                f"The task {name} comes with this project: give your own another name, because a "
                "run's folder knows its tasks by name."
            )
        check_table({name: kind}, "The table of tasks")
        self.data[name] = kind

    def __ior__(self, other: Any) -> TaskTable:
        self.update(other)  # UserDict's own goes around `__setitem__`
        return self

    def __delitem__(self, name: str) -> None:
        if name in self.fixed:
            raise UserError(f"The task {name} comes with this project, and cannot be removed.")
        del self.data[name]


def in_order(chosen: Iterable[str], table: Mapping[str, TaskKind]) -> tuple[str, ...]:
    """The chosen names in the table's order, each once; UserError for an unknown one."""
    wanted = set(chosen)
    for name in sorted(wanted - set(table)):
        raise unknown("task", name, list(table))
    return tuple(name for name in table if name in wanted)


def build(name: str, table: Mapping[str, TaskKind], **settings: Any) -> Task:
    """The task with this name; settings are the keyword arguments of its `task` function.

    Raises UserError for an unknown task, an unknown setting or a required one that is missing.
    """
    if name not in table:
        raise unknown("task", name, list(table))
    make = table[name].task
    parameters = inspect.signature(make).parameters
    for key in settings:
        if key not in parameters:
            raise unknown(f"setting of task {name}", key, list(parameters))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in settings:
            raise UserError(f"Task '{name}' needs the setting '{key}'.")
    return make(**settings)


def make(table: Mapping[str, TaskKind], given: TaskFacts, weight: float | None = None) -> Task:
    """The task that a run gets; weight: of its loss; None: its paper's weight.

    Raises UserError where the table's entry cannot be made, or makes another task than it says.
    """
    name, kind = given.name, table[given.name]
    try:
        takes_weight = "weight" in inspect.signature(kind.task).parameters
        if weight is not None and not takes_weight:
            raise UserError(
                f"train.weights.{name} is {weight:g}, but the function of the task {name} takes no "
                "`weight`: give it that argument, or leave the option out."
            )
        chosen = {} if weight is None else {"weight": weight}
        made = build(name, table, **kind.settings(given), **chosen)
    except UserError:
        raise
    except Exception as error:  # whatever a function of somebody's own may raise
        words = " ".join(str(error).split())[:300]
        raise UserError(
            f"The task {name} cannot be made: {type(error).__name__}: {words}; correct what the "
            "table has for it."
        ) from error
    if not isinstance(made, Task) or made.name != name:
        what = f"the task {made.name}" if isinstance(made, Task) else f"{made!r:.60}"
        raise UserError(
            f"The table's entry for the task {name} makes {what}: its function must return a Task "
            f"whose name is {name}."
        )
    return made
