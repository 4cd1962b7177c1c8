"""Batches of rows as a pure function of (seed, step), like `pipeline.Training` for images.

Row r of step s is row number s * B + r of one endless sequence, epoch after epoch in a new order;
a host reads only its rows of the global batch. Nothing has to be saved to go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moezoo.data.pipeline import Batch, in_advance, prefetch, shuffled
from moezoo.data.text.rows import Row, TextSource, blank
from moezoo.errors import UserError


def stack(rows: Sequence[Row]) -> Batch:
    """Arrays int32 [B,T] of rows."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class TextTraining:
    """Training batches of `size` rows (all hosts together)."""

    def __init__(self, source: TextSource, size: int, seed: int):
        if size < 1:
            raise UserError(f"The batch size is {size}; it must be at least 1.")
        self.source, self.size, self.seed = source, size, seed

    def places(self, step: int, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Epoch and number of the source's rows in these rows of the global batch."""
        count = len(self.source)
        found = [divmod(step * self.size + row, count) for row in rows]
        return [(epoch, int(shuffled(self.seed, epoch, count)[place])) for epoch, place in found]

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """The global batch of a step, or only some rows of it (see `pipeline.host_rows`)."""
        rows = range(self.size) if rows is None else rows
        return stack([self.source.epoch(e)[index] for e, index in self.places(step, rows)])

    def batches(
        self,
        start: int = 0,
        stop: int | None = None,
        rows: Sequence[int] | None = None,
        ahead: int = 2,
    ) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from `start` on, prepared by a thread up to `ahead` steps in advance."""
        return in_advance(lambda step: self.batch(step, rows), start, stop, ahead)


def text_evaluation(
    source: TextSource, size: int, rows: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every row of the source once, in order, in batches of `size` rows (or some rows of each).

    The last batch is filled up with rows of padding; `valid` bool [B] is False there.
    """
    rows = range(size) if rows is None else rows
    empty = blank(source.info.length, source.info.pad)

    def produce() -> Iterator[Batch]:
        for start in range(0, len(source), size):
            wanted = [start + row for row in rows]
            there = [index < len(source) for index in wanted]
            batch = stack([source[i] if t else empty for i, t in zip(wanted, there, strict=True)])
            yield batch | {"valid": np.array(there)}

    return prefetch(produce(), 2)
