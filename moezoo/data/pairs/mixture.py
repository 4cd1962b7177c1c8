"""A mixture of tasks on pairs: each step is a batch of one task, drawn by its weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moezoo.data.pairs.tasks import TASKS, Batch, Pairs
from moezoo.data.pairs.words import Words
from moezoo.data.pipeline import Training
from moezoo.data.source import Arrays
from moezoo.errors import UserError, unknown


class Mixture:
    """Batches as a pure function of (seed, step), like `pipeline.Training`.

    Args:
      source: images with captions and the label `scene`.
      words: the vocabulary of the captions.
      length: tokens of a text; the longest caption needs one more for its start.
      sizes: examples of a batch, by task.
      weights: how often a task is drawn, by task; what is not named is not.
      augment: names of augmentations of the image that leave the caption true.

    Raises UserError for unknown tasks, weights that are not above 0, and sources without captions.
    """

    def __init__(
        self,
        source: Arrays,
        words: Words,
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
            raise UserError(f"{source.info.name} has no captions: take --data.name rooms.")
        self.source, self.words, self.length, self.seed = source, words, length, seed
        self.names = tuple(sorted(weights))
        share = np.array([weights[name] for name in self.names], float)
        self._bounds = np.cumsum(share / share.sum())
        self._training = {
            name: Training(source, sizes[name], seed, ("scene",), augment) for name in self.names
        }

    def task(self, step: int) -> str:
        """The task of a step, the same for all processes."""
        draw = self._generator(step, 2**32).random()
        return self.names[min(int(np.searchsorted(self._bounds, draw)), len(self.names) - 1)]

    def batch(self, step: int, rows: Sequence[int] | None = None) -> tuple[str, Batch]:
        """The task and batch of a step, or some rows of it."""
        name = self.task(step)
        training = self._training[name]
        rows = range(training.size) if rows is None else rows
        made = training.batch(step, rows)
        said = tuple(self.source.captions[i] for i in training.indices(step, rows))
        image = np.asarray(made["image"], np.float32)
        pairs = Pairs(image, said, made["scene"], self.words, self.length)
        parts = [
            TASKS[name](_one(pairs, at), self._generator(step, row)) for at, row in enumerate(rows)
        ]
        return name, {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _generator(self, step: int, row: int) -> np.random.Generator:
        key = np.array([(self.seed % 2**31) << 32 | step % 2**32, row], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def _one(pairs: Pairs, at: int) -> Pairs:
    """One example, so that its random numbers do not depend on which rows a process has."""
    here = slice(at, at + 1)
    return Pairs(
        pairs.image[here], pairs.captions[here], pairs.scene[here], pairs.words, pairs.length
    )
