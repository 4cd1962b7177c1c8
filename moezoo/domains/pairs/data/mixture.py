"""A mixture of tasks on pairs: each step is a batch of one task, drawn by its weight.

Uni-Perceiver-MoE (arXiv:2206.04674) trains in this way: one task per batch and step. Evaluation
goes over every example under every task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moezoo.data.pipeline import in_advance, prefetch
from moezoo.data.source import ArraySource
from moezoo.domains.images.data import batches as images
from moezoo.domains.pairs.data.parts import TASKS, CaptionedImages, PairBatch
from moezoo.domains.pairs.data.words import Vocabulary
from moezoo.errors import UserError, unknown


class Mixture:
    """Batches as a pure function of (seed, step), like `pipeline.Training`.

    Args:
      source: images with captions and the label `scene`.
      words: the vocabulary of the captions.
      length: tokens of a text; the longest caption needs one more for its start.
      sizes: examples per batch, by task.
      weights: how often a task is drawn, by task; tasks not named are never drawn.
      augment: names of image augmentations that leave the caption true.

    Raises UserError for unknown tasks, weights that are not above 0, and sources without captions.
    """

    def __init__(
        self,
        source: ArraySource,
        words: Vocabulary,
        length: int,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        seed: int,
        augment: Sequence[str] = (),
    ):
        for name, weight in weights.items():
            if name not in TASKS:
                raise unknown("task on pairs", name, list(TASKS))
            if not weight > 0:
                raise UserError(f"The weight of task {name} is {weight}; it must be above 0.")
        if not weights:
            raise UserError("A mixture needs at least one task with a weight.")
        if len(source.captions) != len(source):
            raise UserError(f"{source.info.name} has no captions: use --data.name rooms.")
        self.source, self.words, self.length, self.seed = source, words, length, seed
        self.names = tuple(sorted(weights))
        share = np.array([weights[name] for name in self.names], float)
        self._bounds = np.cumsum(share / share.sum())
        self._training = {
            name: images.training(source, sizes[name], seed, ("scene",), augment)
            for name in self.names
        }

    def task(self, step: int) -> str:
        """The task of a step, the same for all processes."""
        draw = self._generator(step, 2**32).random()
        return self.names[min(int(np.searchsorted(self._bounds, draw)), len(self.names) - 1)]

    def batch(self, step: int, rows: Sequence[int] | None = None) -> tuple[str, PairBatch]:
        """The task and batch of a step, or some rows of it."""
        name = self.task(step)
        training = self._training[name]
        rows = range(training.size) if rows is None else rows
        made = training.batch(step, rows)
        said = tuple(self.source.captions[i] for i in training.indices(step, rows))
        pairs = CaptionedImages(made["image"], said, made["scene"], self.words, self.length)
        return name, each(name, pairs, [self._generator(step, row) for row in rows])

    def batches(
        self, start: int, stop: int, rows: Sequence[int] | None = None, ahead: int = 2
    ) -> Iterator[tuple[int, dict[str, PairBatch]]]:
        """(step, {task: batch}) from `start` on, by a thread up to `ahead` steps in advance."""
        return in_advance(lambda step: dict([self.batch(step, rows)]), start, stop, ahead)

    def _generator(self, step: int, row: int) -> np.random.Generator:
        key = np.array([(self.seed % 2**31) << 32 | step % 2**32, row], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def evaluation(
    source: ArraySource,
    count: int,
    words: Vocabulary,
    length: int,
    size: int,
    tasks: Sequence[str],
    rows: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """The first `count` examples once, under every task: {task: batch, ..., "valid": bool [B]}.

    In batches of `size` rows, or some rows of each. The last batch is filled up with the last
    example; `valid` is False in those rows. Randomness depends on the example alone.
    """
    last = min(count, len(source)) - 1

    def produce() -> Iterator[dict[str, Any]]:
        for start in range(0, last + 1, size):
            wanted = [start + row for row in rows]
            there = [min(index, last) for index in wanted]
            made = images.collate([source[i] for i in there], ("scene",), source.info)
            said = tuple(source.captions[i] for i in there)
            pairs = CaptionedImages(made["image"], said, made["scene"], words, length)
            parts = {
                name: each(name, pairs, [np.random.default_rng([0, i]) for i in there])
                for name in tasks
            }
            yield parts | {"valid": np.array([index <= last for index in wanted])}

    return prefetch(produce(), 2)


def each(name: str, pairs: CaptionedImages, generators: Sequence[np.random.Generator]) -> PairBatch:
    """A task's batch, with separate random numbers for each example."""
    parts = [TASKS[name](_one(pairs, at), own) for at, own in enumerate(generators)]
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _one(pairs: CaptionedImages, at: int) -> CaptionedImages:
    """One example, so that its random numbers do not depend on which rows a process has."""
    here = slice(at, at + 1)
    return CaptionedImages(
        pairs.image[here], pairs.captions[here], pairs.scene[here], pairs.words, pairs.length
    )
