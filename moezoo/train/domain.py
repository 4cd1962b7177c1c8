"""What a run trains on: images or text, and everything that differs between the two.

The trainer knows a `Domain`; which one a run has follows from the kind of its `data` section.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from moezoo.data import config as data_config
from moezoo.data import pipeline
from moezoo.data.source import First, Source
from moezoo.data.text import batches as text_batches
from moezoo.data.text import config as text_config
from moezoo.data.text.config import TextDataConfig
from moezoo.errors import UserError
from moezoo.tasks.base import Task
from moezoo.train.schema import Config
from moezoo.train.step import of_image

Batch = dict[str, Any]
LM = "lm"


class Classes(NamedTuple):
    """What a data set's labels mean, by task: how many classes, and their names.

    groups: the names of what a token's task number counts in records; None: the tasks.
    """

    counts: Mapping[str, int]
    names: Mapping[str, tuple[str, ...]]
    groups: tuple[str, ...] | None = None


def classes_of(source: Source) -> dict[str, int]:
    """How many classes the data set's label maps have, for the tasks that have classes."""
    return {task: labels.classes for task, labels in source.info.labels.items()}


def names_of(source: Source) -> dict[str, tuple[str, ...]]:
    """The names of those classes."""
    return {task: labels.names for task, labels in source.info.labels.items()}


class Domain(Protocol):
    """Images or text."""

    unit: str

    def check(self, config: Config) -> None:
        """Raise UserError where the `data` section has no meaning."""
        ...

    def open(self, config: Config, split: str) -> Any:
        """The `train` or `test` split: a source with a length."""
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


class Images:
    """Pictures with dense labels or a class."""

    unit = "images"

    def check(self, config: Config) -> None:
        data_config.check(images_of(config))

    def open(self, config: Config, split: str) -> Source:
        return data_config.open_source(images_of(config), split)

    def classes(self, source: Source) -> Classes:
        return Classes(classes_of(source), names_of(source))

    def size(self, config: Config) -> tuple[int, int]:
        return images_of(config).resolution

    def example(self, config: Config) -> tuple[Batch, Classes]:
        data = images_of(config)
        source = data_config.form_of(data)
        made = pipeline.Training(source, 1, 0, config.tasks, data.augment).batch(0)
        return made, self.classes(source)

    def training(
        self, config: Config, source: Source, tasks: Sequence[str], start: int, rows: range
    ) -> Iterator[tuple[int, Batch]]:
        augment = images_of(config).augment
        made = pipeline.Training(source, config.train.batch, config.seed, tasks, augment)
        return made.batches(start, config.train.steps, rows)

    def evaluation(
        self, source: Source, count: int, size: int, names: Sequence[str], rows: range
    ) -> Iterator[Batch]:
        return pipeline.evaluation(First(source, count), size, names, rows)

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        return of_image(model, batch, **options)

    def describe(self, config: Config) -> str:
        return f"at {self.size(config)[0]}x{self.size(config)[1]}"

    def check_labels(self, tasks: Sequence[Task], source: Source) -> None:
        """UserError for a task that the data set has no labels or no truth for."""
        info = source.info
        for task in tasks:
            if task.name not in info.tasks:
                raise UserError(
                    f"{info.name} has no labels for task {task.name}: take --tasks from "
                    f"{', '.join(info.tasks)}."
                )
            if task.truth not in (*info.tasks, *info.extras):
                raise UserError(
                    f"The protocol of task {task.name} scores against {task.truth}, which "
                    f"{info.name} does not have: take another --protocol.{task.name}, or leave "
                    "it out for the data set's own."
                )


class Text:
    """Rows of tokens; all arrays of a row are the label of the one task, "lm"."""

    unit = "rows"

    def check(self, config: Config) -> None:
        text_config.check(_text(config))

    def open(self, config: Config, split: str) -> text_batches.TextSource:
        return text_config.open_text(_text(config), split)

    def classes(self, source: text_batches.TextSource) -> Classes:
        info = source.info
        return Classes({LM: info.vocabulary}, {LM: info.tasks}, info.tasks)

    def size(self, config: Config) -> tuple[int, int]:
        return 1, _text(config).length

    def example(self, config: Config) -> tuple[Batch, Classes]:
        data = _text(config)
        tokenizer, length = text_config.tokenizer_of(data), data.length
        tasks = text_config.tasks_of(data)
        row = text_batches.stack([text_batches.blank(length, tokenizer.pad)])
        return {LM: row}, Classes({LM: tokenizer.vocabulary}, {LM: tasks}, tasks)

    def training(
        self,
        config: Config,
        source: text_batches.TextSource,
        tasks: Sequence[str],
        start: int,
        rows: range,
    ) -> Iterator[tuple[int, Batch]]:
        made = text_batches.TextTraining(source, config.train.batch, config.seed)
        return ((s, {LM: b}) for s, b in made.batches(start, config.train.steps, rows))

    def evaluation(
        self, source: Any, count: int, size: int, names: Sequence[str], rows: range
    ) -> Iterator[Batch]:
        for batch in text_batches.text_evaluation(First(source, count), size, rows):  # type: ignore[arg-type]
            valid = batch.pop("valid")
            yield {LM: batch, "valid": valid}

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        return model.read(batch[LM], **options)

    def check_labels(self, tasks: Sequence[Task], source: Any) -> None:
        pass  # rows have all there is

    def describe(self, config: Config) -> str:
        return f"of {_text(config).length} tokens"


def of(config: Config) -> Domain:
    """The domain of a configuration."""
    return Text() if isinstance(config.data, TextDataConfig) else Images()


def images_of(config: Config) -> data_config.DataConfig:
    """The `data` section of a run on images; UserError where it is one on text."""
    if not isinstance(config.data, data_config.DataConfig):
        raise UserError(
            f"{config.name} is a run on text, and this works on images only: name another run."
        )
    return config.data


def _text(config: Config) -> TextDataConfig:
    assert isinstance(config.data, TextDataConfig)
    return config.data


def check_kinds(config: Config) -> None:
    """UserError where the model's kind, the data's and the tasks' do not go together."""
    text, rows = isinstance(config.data, TextDataConfig), getattr(config.model, "per_row", False)
    model = type(config.model).__name__
    if text != rows:
        raise UserError(
            f"{model} reads {'text' if rows else 'images'}, but the data section of {config.name} "
            f"is one of {'text' if text else 'images'}."
        )
    for task in config.tasks:
        if (task == LM) != text:
            raise UserError(
                f"Task {task} does not belong to {'text' if text else 'images'}: "
                f"take {'--tasks lm' if text else 'other tasks'}."
            )
