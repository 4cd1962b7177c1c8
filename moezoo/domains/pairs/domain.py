"""Images with sentences about them: one task per training step, all of them in an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from moezoo.data.source import Arrays
from moezoo.domains.pairs.data import config as pairs_config
from moezoo.domains.pairs.data import mixture
from moezoo.domains.pairs.data import parts as pairs_tasks
from moezoo.domains.pairs.data.config import PairsDataConfig, words_of
from moezoo.domains.pairs.data.words import PAD
from moezoo.errors import UserError
from moezoo.models.conditional_moe import reading as conditional_read
from moezoo.models.conditional_moe.conditions import table_of
from moezoo.models.conditional_moe.reading import Reading
from moezoo.tasks.base import Task
from moezoo.train.domain import Batch, Classes, class_names_of
from moezoo.train.schema import Config

PARTNERS = ("retrieval", "counts")  # tasks whose candidates are those of the batch


class Pairs:
    """The tasks of a conditional encoder; a batch is {task: its part}.

    conditions: the lines of the model's table.
    """

    unit, kind, validated = "examples", "pairs", False

    def __init__(self, data: PairsDataConfig, conditions: tuple[str, ...]):
        self.data, self.conditions = data, conditions

    def check(self, config: Config) -> None:
        """Raise UserError where the `data` section has no meaning, or is not the model's."""
        pairs_config.check(self.data, config.tasks)
        for task in config.tasks:
            table_of(self.conditions).check_task(task)
        self._check_partners(config)
        model: Any = config.model
        needs = {"vocabulary": len(words_of(self.data)), "text_length": self.data.length}
        for name, needed in needs.items():
            has = getattr(model, name, needed)  # somebody's own model may know its texts
            if has < needed:
                raise UserError(
                    f"model.{name} is {has}, but the texts of {self.data.name} need {needed}."
                )

    def _check_partners(self, config: Config) -> None:
        size = config.train.batch // config.train.gradient_accumulation
        for task in self.data.shares.of(config.tasks):
            if task in PARTNERS and size < 2:
                raise UserError(
                    f"Task {task} compares the examples of a batch, or of a slice of it, and "
                    f"train.batch {config.train.batch} leaves {size}: take at least 2."
                )

    def open(self, config: Config, split: str) -> Arrays:
        return pairs_config.open_pairs(self.data, split)

    def classes(self, source: Any) -> Classes:
        words, scenes = len(words_of(self.data)), class_names_of(source)["scene"]
        counts = {"scene": len(scenes), "text_scene": len(scenes), "caption": words, "mlm": words}
        groups = conditional_read.groups(table_of(self.conditions))
        return Classes(counts, dict.fromkeys(("scene", "text_scene"), scenes), groups)

    def size(self, config: Config) -> tuple[int, int]:
        return self.data.resolution

    def example(self, config: Config) -> tuple[Batch, Classes]:
        """Of the task whose step is the largest: an image with a text, where there is one."""
        source = pairs_config.form_of(self.data)
        for name in ("caption", "retrieval", "counts", "scene", *config.tasks):
            if name in config.tasks:
                _, part = self._mixture(source, {name: 1.0}, 1, config.seed).batch(0)
                return {name: part}, self.classes(source)
        raise AssertionError("a configuration has tasks")

    def training(
        self, config: Config, source: Arrays, tasks: Sequence[str], start: int, rows: range
    ) -> Iterator[tuple[int, Batch]]:
        shares = self.data.shares.of(tuple(tasks))
        made = self._mixture(source, shares, config.train.batch, config.seed)
        return made.batches(start, config.train.steps, rows)

    def _mixture(
        self, source: Arrays, shares: Mapping[str, float], size: int, seed: int
    ) -> mixture.Mixture:
        return mixture.Mixture(
            source,
            words_of(self.data),
            self.data.length,
            dict.fromkeys(shares, size),
            shares,
            seed,
            self.data.augment,
        )

    def evaluation(
        self, source: Any, count: int, size: int, names: Sequence[str], rows: range
    ) -> Iterator[Batch]:
        words, length = words_of(self.data), self.data.length
        return mixture.evaluation(source, count, words, length, size, names, rows)

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        return self.reading(model, batch, **options)

    @property
    def reading(self) -> Reading:
        """How a model is asked."""
        return _reading(self.data)

    def check_labels(self, tasks: Sequence[Task], source: Any) -> None:
        pass  # every task is made of image, caption and kind of scene

    def describe(self, config: Config) -> str:
        height, width = self.data.resolution
        return f"at {height}x{width} with texts of up to {self.data.length} words"


@cache
def _reading(data: PairsDataConfig) -> Reading:
    words = words_of(data)
    found = {name: pairs_tasks.candidates(name, words) for name in ("scene", "text_scene")}
    return Reading({name: ids for name, ids in found.items() if ids is not None}, PAD)
