"""What a domain is: everything that differs between runs on one kind of data and another.

The `data` section of a configuration is a frozen dataclass; its property `domain` gives the object
that answers all that the trainer asks. A new domain is a folder with such a pair and one line in
`moezoo.registry`; nothing here knows of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, TypeVar

from moezoo.data.source import Batch, Source
from moezoo.errors import UserError, unknown
from moezoo.fields import shown
from moezoo.models.shared.config import traits
from moezoo.tasks.base import Task
from moezoo.tasks.registry import TaskKind, check_table
from moezoo.train.classes import Classes
from moezoo.train.schema import Config


@dataclass(frozen=True)
class NoProtocol:
    """The `protocol` section of a domain whose tasks are posed and scored in one way only."""


class Pretrained:
    """What runs of a domain can begin with besides runs: here nothing.

    what: such a model, in words.   wanted: what to name instead of something else.   has_options:
    whether `start_heads` and `start_without` are about it.   runs_on: the other domains whose runs
    `of_run` can read.   last_resort: whether files that no domain knows are its, which then says
    what is wrong with them.
    """

    what: ClassVar[str] = "a pretrained model"
    wanted: ClassVar[str] = "that of another run"
    has_options: ClassVar[bool] = False
    runs_on: ClassVar[tuple[str, ...]] = ()
    last_resort: ClassVar[bool] = False

    def knows(self, path: Path) -> bool:
        """Whether what lies there is such a model."""
        return False

    def look(self, path: Path) -> None:
        """UserError where what lies there is no such model after all, or damaged."""

    def check(self, path: Path, config: Config) -> None:
        """UserError where it does not go together with the configured model."""

    def shapes(self, path: Path) -> Mapping[str, tuple[int, ...]]:
        """Those of its arrays by our paths, as far as experts may begin with them."""
        return {}

    def arrays(
        self, path: Path, config: Config, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Any] | None:
        """Its arrays by our paths, for a model with parameters and statistics of these shapes.

        None: they go straight to their places, by `place`.
        """
        raise NotImplementedError

    def place(self, path: Path, state: dict[str, Any]) -> dict[str, Any]:
        """The state with its arrays where the state's own lay, which are given up first."""
        raise NotImplementedError

    def loaded(self, path: Path) -> tuple[Any, Classes]:
        """It as a model by itself (`setup.Loaded`), and what its labels mean."""
        raise UserError(
            f"{path} is {self.what}, which answers no task by itself: begin a model with it, "
            f'moezoo.create(name, pretrained="{path}").'
        )

    def left_behind(self, path: Path, config: Config) -> str:
        """What of it was not taken, as a further sentence; "" for nothing."""
        return ""

    def of_run(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters of another run by the paths of this domain's models."""
        return params


Section = TypeVar("Section", bound=Any)  # the class of its `data` section


class Domain(ABC, Generic[Section]):
    """Everything that differs between runs on this kind of data and runs on another.

    name: of the domain, which a model's configuration states as what it `reads`; also what a run
    is "on".   unit: what examples are called.   validated: whether there is a split `valid` besides
    `test` to look at on the way.   tasks: what can be asked about an example.   pictures: the files
    that `draw` leaves, and what each shows.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    validated: ClassVar[bool] = False
    tasks: Mapping[str, TaskKind]
    pictures: Mapping[str, str] = MappingProxyType({"predictions.png": "predictions beside truth"})

    def __init__(self, data: Section):
        self.data = data

    @property
    def pretrained(self) -> Pretrained:
        """What runs can begin with besides runs."""
        return Pretrained()

    @abstractmethod
    def check(self, config: Config) -> None:
        """Raise UserError where the `data` section has no meaning, or does not fit the model."""

    @abstractmethod
    def open(self, config: Config, split: str) -> Any:
        """The `train` or `test` split, or `valid` where there is one: a source with a length."""

    @abstractmethod
    def classes(self, config: Config, source: Any) -> Classes:
        """What the source's labels mean."""

    @abstractmethod
    def size(self, config: Config) -> tuple[int, int]:
        """The size that a model is built for."""

    @abstractmethod
    def example(self, config: Config) -> tuple[Batch, Classes]:
        """A training batch of one example in the configured form; needs no archive."""

    @abstractmethod
    def training(
        self, config: Config, source: Any, tasks: Sequence[str], start: int, rows: Sequence[int]
    ) -> Iterator[tuple[int, Batch]]:
        """(step, this process's rows of the batch) from `start` to the end of the run."""

    @abstractmethod
    def evaluation(
        self, source: Any, count: int, size: int, names: Sequence[str], rows: Sequence[int]
    ) -> Iterator[Batch]:
        """The first `count` examples once, with `valid`."""

    @abstractmethod
    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for a batch; options are `key` and `train`."""

    @abstractmethod
    def describe(self, config: Config) -> str:
        """The form of an example, in words."""

    def amount(self, source: Any, split: str) -> str:
        """How much a split of it is, in words: "16 test images"."""
        return f"{len(source)} {split} {self.unit}"

    def narrowed(self, groups: Sequence[str]) -> str:
        """How data are restricted to some of the names that tokens are numbered by, as advice."""
        return f"take data of {', '.join(groups)} only"

    def told_data(self, config: Config) -> str:
        """Which data a configuration learns, in words."""
        return self.data.name

    def questions(self, config: Config) -> tuple[str, ...]:
        """Examples of what a model that is asked in words can be asked; () for others."""
        return ()

    @abstractmethod
    def draw(self, finished: Any, folder: Path, count: int) -> None:
        """Leave pictures of a finished run (`loop.Finished`); all processes take part."""

    def check_labels(self, tasks: Sequence[Task], source: Any) -> None:
        """UserError for a task that the source has no labels or no truth for."""
        check_tasks_of(tasks, source)

    def protocol(self) -> Any:
        """The default `protocol` section: how tasks are posed and scored where that differs."""
        return NoProtocol()

    def groups(self, config: Config) -> int | None:
        """How many tasks tokens are numbered by; None: not known before there is data."""
        return len(config.tasks)

    def shares(self, config: Config) -> Mapping[str, float] | None:
        """The share of the steps that each task has, where every step is one task's; else None."""
        return None

    def beside(self, other: Any) -> Any:
        """Another data section with its data in the same place, where both say where that is."""
        place = "data_dir"
        both = {field.name for field in fields(self.data)} & {field.name for field in fields(other)}
        return replace(other, **{place: getattr(self.data, place)}) if place in both else other

    def inference(self, run: Any, classes: Classes) -> Any:
        """How a trained model (`setup.Loaded`) is asked (`deploy.inference.Inference`)."""
        raise UserError(
            f"{run.config.name} is a run on {self.name}, whose models cannot be asked yet: give "
            f"{type(self).__name__} an `inference`, for example an "
            "`moezoo.deploy.inference.ArrayInference`."
        )

    def resized(self, size: tuple[int, int]) -> Any:
        """The data section with examples of another size, as `size` gives it."""
        raise UserError(
            f"Examples of {self.name} have the size that their data section says: leave the size "
            "out."
        )

    def exports(self, config: Config) -> Any:
        """How its tasks are cut out and exported (`deploy.exporter.Exporter`)."""
        raise UserError(
            f"{config.name} is a run on {self.name}, of which no single task can be exported."
        )


def check_domain(section: Any) -> None:
    """UserError where a data section's domain cannot say what runs on it are called, or can learn.

    section: a `data` section of one's own, which is read before anything is made of it.
    """
    kind, domain = type(section).__name__, section.domain
    if not isinstance(domain, Domain):
        raise UserError(
            f"{kind}.domain is {shown(domain)}: make it a property that returns an instance of "
            "your subclass of moezoo.train.domain.Domain."
        )
    for attribute in ("name", "unit"):
        given = getattr(domain, attribute, None)
        if not isinstance(given, str) or not given or not given.isprintable():
            said = "is not set" if given is None else f"is {shown(given)}"
            raise UserError(
                f"{type(domain).__name__}.{attribute} {said}: give the class a text of that name."
            )
    tasks = getattr(domain, "tasks", None)
    if not isinstance(tasks, Mapping) or not tasks:
        raise UserError(
            f"{type(domain).__name__}.tasks is {shown(tasks)}: give the class its tasks by name, "
            'for example tasks = {"total": TaskKind(total)}.'
        )
    check_table(tasks, f"{type(domain).__name__}.tasks")


def check_names_of(tasks: Sequence[str], source: Source) -> None:
    """UserError for a task's name that the data set has no labels for."""
    info = source.info
    for name in tasks:
        if name not in info.tasks:
            raise UserError(
                f"{info.name} has no labels for task {name}: take --tasks from "
                f"{', '.join(info.tasks)}."
            )


def check_tasks_of(tasks: Sequence[Task], source: Source) -> None:
    """UserError for a task that the data set has no labels for, or labels of another kind."""
    check_names_of([task.name for task in tasks], source)
    info = source.info
    for task in tasks:
        if task.label != info.kinds[task.name]:
            raise UserError(
                f"Task {task.name} reads labels that are {task.label}, but {info.name} declares "
                f"{info.kinds[task.name]}: correct one of them."
            )


def check_kinds(config: Config) -> None:
    """UserError where the model's domain and the data's, or tasks and data, do not go together."""
    domain, reads = config.data.domain, traits(config.model).reads
    if domain.name != reads:
        raise UserError(
            f"{type(config.model).__name__} reads {reads}, but the data section of {config.name} "
            f"gives {domain.name}: take another model, or another data section."
        )
    for task in config.tasks:
        if task not in domain.tasks:
            if get_close_matches(task, domain.tasks):
                raise unknown("task", task, list(domain.tasks))
            raise UserError(
                f"Task {task} does not belong to {domain.name}: take --tasks from "
                f"{', '.join(domain.tasks)}."
            )
