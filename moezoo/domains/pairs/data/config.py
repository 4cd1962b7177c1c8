"""The `data` section of a configuration for pairs of images and texts, and opening it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Annotated

import numpy as np

from moezoo import fields
from moezoo.data.source import Arrays, Info, Labels
from moezoo.domains.images.data import config as images
from moezoo.domains.images.data.rooms.names import CLASS_PALETTE, SCENES
from moezoo.domains.pairs.data import captions
from moezoo.domains.pairs.data.words import Words
from moezoo.errors import UserError, unknown
from moezoo.fields import Examples, FilePath, NotNegative, Range, Seed, Side
from moezoo.label import IMAGE

ROOMS = "rooms"
# What leaves captions true.
KEEPING = ("flip", "photometric")


@dataclass(frozen=True)
class Shares:
    """How often a training step is one of each task; 0: never, the task is only scored."""

    scene: NotNegative = 1.0
    """The kind of room, from the image."""
    caption: NotNegative = 1.0
    """The next word of the caption, from the image and the words before."""
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

        A task that has none of its own here has 1 as the others.
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
    """Tokens of a text, at least those of the longest caption and one more."""
    train: Examples = 2000
    """Number of training examples."""
    test: Examples = 400
    """Number of test examples."""
    seed: Seed = 0
    """Seed of the rooms."""
    data_dir: FilePath | None = None
    """Where data sets are kept; default $MOEZOO_DATA, else ~/.cache/moezoo."""
    augment: tuple[str, ...] = ("flip",)
    """Variations of training images: flip, photometric."""
    shares: Shares = field(default_factory=Shares)

    @property
    def images(self) -> images.DataConfig:
        """The same data set as images alone have it."""
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
    """Raise UserError when a field has no meaning, or none of these tasks would be trained."""
    fields.check(config, "data")
    if config.name != ROOMS:
        raise unknown("data set with captions", config.name, [ROOMS])
    images.check(config.images)
    for name in config.augment:
        if name not in KEEPING:
            raise UserError(
                f"data.augment has '{name}', after which captions need not be true: take "
                f"{' or '.join(KEEPING)}."
            )
    if not config.shares.of(tasks):
        raise UserError(
            "The data.shares of all tasks are 0: nothing would be trained; raise one of "
            f"{', '.join(tasks)}."
        )


def open_pairs(config: PairsDataConfig, split: str) -> Arrays:
    """The `train` or `test` split with its captions, in memory; generated first where needed.

    Raises UserError for unknown names, directories that cannot be used, images that do not fit into
    memory, and captions that are longer than `length` allows.
    """
    source = images.open_source(config.images, split)
    if not isinstance(source, Arrays):
        raise UserError(
            f"{len(source)} images of {config.resolution[0]} x {config.resolution[1]} pixels are "
            "too many to be held in memory: lower data.train or data.resolution."
        )
    longest = max(len(words_of(config).encode(text)) for text in source.captions)
    if longest >= config.length:
        raise UserError(
            f"The longest caption has {longest} words and needs a place for its start: data.length "
            f"is {config.length}; it must be at least {longest + 1}."
        )
    kept = {name: source.arrays[name] for name in ("image", "scene")}
    return Arrays(_info(config, split), kept, source.captions)


def form_of(config: PairsDataConfig) -> Arrays:
    """One black example in the configured form; needs no data."""
    image = np.zeros((1, *config.resolution, 3), np.uint8)
    text = f"A {SCENES[0]} with {captions.LISTED[0]}, {captions.LIGHTS[0]}."
    arrays = {"image": image, "scene": np.zeros(1, np.uint8)}
    return Arrays(_info(config, "train"), arrays, [text])


@cache
def words_of(config: PairsDataConfig) -> Words:
    """The words of the configured data set's captions."""
    return captions.vocabulary()


def _info(config: PairsDataConfig, split: str) -> Info:
    scenes = Labels(SCENES, CLASS_PALETTE[: len(SCENES)])
    kinds = {"scene": IMAGE}
    return Info(config.name, split, config.resolution, ("scene",), {"scene": scenes}, kinds=kinds)
