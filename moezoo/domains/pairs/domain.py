"""Runs on images with sentences about them: one task per training step, all in an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np

from moezoo import fields
from moezoo.data.source import ArraySource, Batch, Info, Labels
from moezoo.domains.images import domain as images
from moezoo.domains.images.data.rooms.names import CLASS_PALETTE, SCENES
from moezoo.domains.pairs.data import captions, mixture
from moezoo.domains.pairs.data import parts as pairs_tasks
from moezoo.domains.pairs.data.words import PAD, Vocabulary
from moezoo.domains.pairs.tasks import TASKS
from moezoo.errors import UserError, unknown
from moezoo.fields import ExampleCount, FilePath, NotNegative, Range, Seed, Side
from moezoo.label import IMAGE
from moezoo.models.conditional_moe import reading as conditional_read
from moezoo.models.conditional_moe.conditions import table_of
from moezoo.models.conditional_moe.reading import Reading
from moezoo.models.shared.config import traits
from moezoo.tasks.base import Task
from moezoo.train.domain import Classes, Domain, Pretrained
from moezoo.train.schema import Config

ROOMS = "rooms"
# Augmentations that leave captions true.
KEEPING = ("flip", "photometric")


@dataclass(frozen=True)
class Shares:
    """How often a training step is of each task; 0: never, the task is only scored."""

    scene: NotNegative = 1.0
    """The kind of room, from the image."""
    caption: NotNegative = 1.0
    """The next word of the caption, from the image and the preceding words."""
    retrieval: NotNegative = 1.0
    """Which caption belongs to which image."""
    mlm: NotNegative = 1.0
    """Hidden words of the caption."""
    text_scene: NotNegative = 1.0
    """The kind of room, from the things in it."""
    counts: NotNegative = 0.0
    """Which image has the things that a phrase lists, in these numbers."""

    def of(self, tasks: tuple[str, ...]) -> dict[str, float]:
        """The shares of these tasks that are above 0, by task; they add up to 1.

        A task without a share of its own here has 1, like the others.
        """
        given = {name: value for name in tasks if (value := getattr(self, name, 1.0)) > 0}
        return {name: value / sum(given.values()) for name, value in given.items()}


@dataclass(frozen=True)
class PairsDataConfig:
    """Which images with captions, and how the tasks on them are mixed: one task per step."""

    name: str = ROOMS
    """Data set: rooms."""
    resolution: tuple[Side, Side] = (64, 64)
    """Height and width in pixels."""
    length: Annotated[int, Range(1, 2**16)] = 40
    """Tokens of a text: at least one more than the longest caption has."""
    train: ExampleCount = 2000
    """Number of training examples."""
    test: ExampleCount = 400
    """Number of test examples."""
    seed: Seed = 0
    """Seed for the rooms."""
    data_dir: FilePath | None = None
    """Where data sets are kept; default: $MOEZOO_DATA, else ~/.cache/moezoo."""
    augment: tuple[str, ...] = ("flip",)
    """Variations of training images: flip, photometric."""
    shares: Shares = field(default_factory=Shares)

    @property
    def domain(self) -> PairDomain:
        """The domain that runs on pairs use."""
        return PairDomain(self)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The data sets with captions."""
        return (ROOMS,)

    @property
    def images(self) -> images.DataConfig:
        """The same data set in the form of an images-only run."""
        return images.DataConfig(
            self.name,
            self.resolution,
            self.train,
            self.test,
            self.seed,
            self.data_dir,
            augment=self.augment,
        )


def check(config: PairsDataConfig, tasks: tuple[str, ...]) -> None:
    """Raise UserError if a field has no meaning, or none of these tasks would be trained."""
    fields.check(config, "data")
    if config.name != ROOMS:
        raise unknown("data set with captions", config.name, [ROOMS])
    images.check(config.images)
    for name in config.augment:
        if name not in KEEPING:
            raise UserError(
                f"data.augment has '{name}', after which captions may be wrong: use "
                f"{' or '.join(KEEPING)}."
            )
    if not config.shares.of(tasks):
        raise UserError(
            "The data.shares of all tasks are 0: nothing would be trained; raise one of "
            f"{', '.join(tasks)}."
        )


def open_pairs(config: PairsDataConfig, split: str) -> ArraySource:
    """The `train` or `test` split with its captions, in memory; generated first if needed.

    Raises UserError for unknown names, directories that cannot be used, images that do not fit into
    memory, and captions that are longer than `length` allows.
    """
    source = images.open_source(config.images, split)
    if not isinstance(source, ArraySource):
        raise UserError(
            f"{len(source)} images of {config.resolution[0]} x {config.resolution[1]} pixels are "
            "too many to hold in memory: lower data.train or data.resolution."
        )
    longest = max(len(words_of(config).encode(text)) for text in source.captions)
    if longest >= config.length:
        raise UserError(
            f"The longest caption has {longest} words and needs a place for its start: data.length "
            f"is {config.length}; it must be at least {longest + 1}."
        )
    kept = {name: source.arrays[name] for name in ("image", "scene")}
    return ArraySource(_info(config, split), kept, source.captions)


def form_of(config: PairsDataConfig) -> ArraySource:
    """One black example in the configured form; needs no data."""
    image = np.zeros((1, *config.resolution, 3), np.uint8)
    text = f"A {SCENES[0]} with {captions.LISTED[0]}, {captions.LIGHTS[0]}."
    arrays = {"image": image, "scene": np.zeros(1, np.uint8)}
    return ArraySource(_info(config, "train"), arrays, [text])


def words_of(config: PairsDataConfig) -> Vocabulary:
    """The words of the configured data set's captions."""
    return captions.vocabulary()


def _info(config: PairsDataConfig, split: str) -> Info:
    scenes = Labels(SCENES, CLASS_PALETTE[: len(SCENES)])
    kinds = {"scene": IMAGE}
    return Info(config.name, split, config.resolution, ("scene",), {"scene": scenes}, kinds=kinds)


PARTNERS = ("retrieval", "counts")  # tasks whose candidates are those of the batch


class PairDomain(Domain[PairsDataConfig]):
    """The tasks of a conditional encoder; a batch is {task: its part}."""

    name, unit = "pairs", "examples"
    tasks = TASKS
    pictures = MappingProxyType(
        {
            "captions.png": "captions beside truth",
            "retrieval.png": "the images most similar to a caption; green: its own images",
            "counts.png": "the images most similar to a list of things; green: they have them",
            "confusion.png": "which class was taken for which",
        }
    )

    @property
    def pretrained(self) -> Pretrained:
        """Checkpoints of Uni-Perceiver's code, and runs on images."""
        from moezoo.domains.pairs.pretrained import ConditionalEncoders

        return ConditionalEncoders()

    def check(self, config: Config) -> None:
        """Raise UserError if the `data` section has no meaning, or does not fit the model."""
        check(self.data, config.tasks)
        model = traits(config.model)
        for task in config.tasks:
            table_of(model.conditions).check_task(task)
        self._check_partners(config)
        needs = {"vocabulary": len(words_of(self.data)), "text_length": self.data.length}
        for name, needed in needs.items():
            has = getattr(model, name)
            if has is not None and has < needed:  # a user's own model may know its texts
                raise UserError(
                    f"model.{name} is {has}, but the texts of {self.data.name} need {needed}."
                )

    def _check_partners(self, config: Config) -> None:
        size = config.train.batch // config.train.gradient_accumulation
        for task in self.data.shares.of(config.tasks):
            if task in PARTNERS and size < 2:
                raise UserError(
                    f"Task {task} compares the examples of a batch, or of a slice of it, and "
                    f"train.batch {config.train.batch} leaves {size}: use at least 2."
                )

    def open(self, config: Config, split: str) -> ArraySource:
        """The `train` or `test` split with its captions, in memory."""
        return open_pairs(self.data, split)

    def classes(self, config: Config, source: Any) -> Classes:
        """Kinds of room, words, and the lines of the model's table of conditions."""
        words, scenes = len(words_of(self.data)), source.info.labels["scene"].names
        counts = {"scene": len(scenes), "text_scene": len(scenes), "caption": words, "mlm": words}
        groups = conditional_read.groups(table_of(traits(config.model).conditions))
        return Classes(counts, dict.fromkeys(("scene", "text_scene"), scenes), groups)

    def groups(self, config: Config) -> int:
        """The lines of the model's table of conditions, which tokens are numbered by."""
        return len(conditional_read.groups(table_of(traits(config.model).conditions)))

    def size(self, config: Config) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.data.resolution

    def example(self, config: Config) -> tuple[Batch, Classes]:
        """An example for the task with the largest step: an image, with a text if there is one."""
        source = form_of(self.data)
        for name in ("caption", "retrieval", "counts", "scene", *config.tasks):
            if name in config.tasks:
                _, part = self._mixture(source, {name: 1.0}, 1, config.seed).batch(0)
                return {name: part}, self.classes(config, source)
        raise AssertionError("a configuration has tasks")

    def training(
        self,
        config: Config,
        source: ArraySource,
        tasks: Sequence[str],
        start: int,
        rows: Sequence[int],
    ) -> Iterator[tuple[int, Batch]]:
        """(step, {task: this process's rows of its batch}), the task drawn by its share."""
        shares = self.data.shares.of(tuple(tasks))
        made = self._mixture(source, shares, config.train.batch, config.seed)
        return made.batches(start, config.train.steps, rows)

    def _mixture(
        self, source: ArraySource, shares: Mapping[str, float], size: int, seed: int
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
        self, source: Any, count: int, size: int, names: Sequence[str], rows: Sequence[int]
    ) -> Iterator[Batch]:
        """The first `count` examples once, under every task."""
        words, length = words_of(self.data), self.data.length
        return mixture.evaluation(source, count, words, length, size, names, rows)

    def read(self, model: Any, batch: Mapping[str, Any], **options: Any) -> Any:
        """The model's output for the tasks of the batch."""
        return self.reading(model, batch, **options)

    @property
    def reading(self) -> Reading:
        """How a model reads a batch."""
        return _reading(self.data)

    def check_labels(self, tasks: Sequence[Task], source: Any) -> None:
        """Nothing to check: every task is made from image, caption and kind of scene."""

    def shares(self, config: Config) -> Mapping[str, float]:
        """How often a step is of each task."""
        return self.data.shares.of(config.tasks)

    def inference(self, run: Any, classes: Classes) -> Any:
        """Photos in, the class and the caption of each out, under those tasks' conditions."""
        from moezoo.deploy.inference import ArrayInference

        return ArrayInference(self.exports(run.config), run, classes)

    def exports(self, config: Config) -> Any:
        """The tasks that read an image alone, as paths from an image to its class or caption."""
        from moezoo.domains.pairs.export import PairExports

        told = self.reading, words_of(self.data), self.data.length
        return PairExports(config, self.data.images, *told)

    def draw(self, finished: Any, folder: Path, count: int) -> None:
        """Captions and finds beside images, confusions, usage."""
        from moezoo.domains.pairs import report  # matplotlib costs a third of a second

        report.draw(finished, folder, count)

    def describe(self, config: Config) -> str:
        """The images' size and the texts' length."""
        height, width = self.data.resolution
        return f"at {height}x{width} with texts of up to {self.data.length} words"


@cache
def _reading(data: PairsDataConfig) -> Reading:
    words = words_of(data)
    found = {name: pairs_tasks.candidates(name, words) for name in ("scene", "text_scene")}
    return Reading({name: ids for name, ids in found.items() if ids is not None}, PAD)
