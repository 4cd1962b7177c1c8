"""What a run trains on: images, text, sounds or pairs, and everything that differs between them.

The trainer knows a `Domain`; which one a run has follows from the kind of its `data` section.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moezoo.data import pipeline
from moezoo.data.source import First, Source
from moezoo.domains.audio.data.config import AudioDataConfig
from moezoo.domains.audio.domain import Audio
from moezoo.domains.images.data import config as data_config
from moezoo.domains.pairs import tasks as similar
from moezoo.domains.pairs.data.config import PairsDataConfig
from moezoo.domains.pairs.domain import Pairs
from moezoo.domains.text.data import config as text_config
from moezoo.domains.text.data import rows as text_batches
from moezoo.domains.text.data.config import TextDataConfig
from moezoo.errors import UserError
from moezoo.tasks.base import Task
from moezoo.tasks.registry import SOUND
from moezoo.train.domain import (
    Batch,
    Classes,
    Domain,
    check_tasks_of,
    class_names_of,
    classes_of,
    colours_of,
)
from moezoo.train.schema import Config
from moezoo.train.step import of_image

__all__ = [
    "Audio",
    "Classes",
    "Domain",
    "Images",
    "Pairs",
    "Text",
    "classes_of",
    "class_names_of",
    "of",
]

LM = "lm"


class Images:
    """Pictures with dense labels or a class."""

    unit, kind, validated = "images", "images", False

    def check(self, config: Config) -> None:
        data_config.check(images_of(config))

    def open(self, config: Config, split: str) -> Source:
        return data_config.open_source(images_of(config), split)

    def classes(self, source: Source) -> Classes:
        return Classes(classes_of(source), class_names_of(source), colours=colours_of(source))

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
        check_tasks_of(tasks, source)
        for task in tasks:
            if task.truth not in (*info.tasks, *info.extras):
                raise UserError(
                    f"The protocol of task {task.name} scores against {task.truth}, which "
                    f"{info.name} does not have: take another --protocol.{task.name}, or leave "
                    "it out for the data set's own."
                )


class Text:
    """Rows of tokens; all arrays of a row are the label of the one task, "lm"."""

    unit, kind, validated = "rows", "text", False

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
    if isinstance(config.data, AudioDataConfig):
        return Audio()
    if isinstance(config.data, PairsDataConfig):
        return Pairs(config.data, getattr(config.model, "conditions", ()))
    return Text() if isinstance(config.data, TextDataConfig) else Images()


def images_of(config: Config) -> data_config.DataConfig:
    """The images of a run on them or on pairs; UserError where it is one on something else."""
    if isinstance(config.data, PairsDataConfig):
        return config.data.images
    if not isinstance(config.data, data_config.DataConfig):
        raise UserError(
            f"{config.name} is a run on {of(config).kind}, and this works on images only: name "
            "another run."
        )
    return config.data


def _text(config: Config) -> TextDataConfig:
    assert isinstance(config.data, TextDataConfig)
    return config.data


def check_kinds(config: Config) -> None:
    """UserError where the model's kind, the data's and the tasks' do not go together."""
    kind, reads = of(config).kind, _kind_of_model(config.model)
    if kind != reads:
        raise UserError(
            f"{type(config.model).__name__} reads {reads}, but the data section of {config.name} "
            f"is one of {kind}."
        )
    for task in config.tasks:
        if kind not in _kinds_of_task(task):
            raise UserError(f"Task {task} does not belong to {kind}: take {TAKE[kind]}.")


TAKE = {
    "images": "other tasks",
    "text": "--tasks lm",
    "sounds": "--tasks event",
    "pairs": f"--tasks from {', '.join(similar.TASKS)}",
}


def _kind_of_model(model: Any) -> str:
    marks = {"per_row": "text", "per_clip": "sounds", "per_pair": "pairs"}
    return next((kind for mark, kind in marks.items() if getattr(model, mark, False)), "images")


def _kinds_of_task(task: str) -> tuple[str, ...]:
    if task in similar.TASKS:
        return ("pairs", "images") if task == "scene" else ("pairs",)
    return ("sounds",) if task in SOUND else ("text",) if task == LM else ("images",)
