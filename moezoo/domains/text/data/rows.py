"""Rows: the arrays of fixed length that text models read, with their sources and batches.

A row has, int32 [T] each: `tokens`; `targets`, the next token of the same document, -1 where there
is no loss; `segments`, 0 for padding and 1, 2, ... for the documents; `positions`, from 0 in each
document; `task`, the task of the token's document, 0 for padding. A document of n tokens takes
n - 1 places: its last token is only a target.

Batches are a pure function of (seed, step), like `pipeline.Training` for images: row r of step s is
row number s * B + r of one endless sequence, epoch after epoch in a new order, and a host reads
only its rows of the global batch. Nothing has to be saved to resume.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moezoo.data.pipeline import Batch, in_advance, prefetch, shuffled
from moezoo.domains.text.data.encode import EncodedDocument, Encodings, TrainedTokens, answers_only
from moezoo.errors import UserError

TextRow = dict[str, np.ndarray]
IGNORE = -1  # a target without loss


@dataclass(frozen=True)
class TextInfo:
    """What a source of rows contains: task names in the order of their numbers, sizes."""

    name: str
    split: str
    tasks: tuple[str, ...]
    vocabulary: int
    length: int
    pad: int


class TextSource(Protocol):
    """Rows by index; `epoch` gives the same number of rows, possibly arranged differently."""

    @property
    def info(self) -> TextInfo: ...

    @property
    def examples(self) -> int | None: ...  # in all rows; None for continuous text

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TextRow: ...

    def epoch(self, number: int) -> TextSource: ...


def blank(length: int, pad: int) -> TextRow:
    """A row of nothing but padding."""
    row = {
        name: np.zeros(length, np.int32)
        for name in ("tokens", "targets", "segments", "positions", "task")
    }
    row["tokens"][:] = pad
    row["targets"][:] = IGNORE
    return row


def fill(
    documents: Sequence[tuple[EncodedDocument, int]], length: int, pad: int, trained: TrainedTokens
) -> TextRow:
    """A row with these (document, task) pairs in sequence; ValueError if they do not fit."""
    row = blank(length, pad)
    start = 0
    for number, (document, task) in enumerate(documents, 1):
        stop = start + len(document.tokens) - 1
        if stop > length:
            raise ValueError(f"documents of {stop} places in a row of {length}")
        here = slice(start, stop)
        row["tokens"][here] = document.tokens[:-1]
        row["targets"][here] = np.where(trained(document)[1:], document.tokens[1:], IGNORE)
        row["segments"][here] = number
        row["positions"][here] = np.arange(stop - start)
        row["task"][here] = task
        start = stop
    return row


class Padded:
    """One example per row, in order."""

    def __init__(
        self,
        documents: Encodings,
        length: int,
        name: str,
        split: str,
        trained: TrainedTokens = answers_only,
    ):
        check_length(documents, length)
        self.documents, self.trained = documents, trained
        self._info = info_of(documents, length, name, split)

    @property
    def info(self) -> TextInfo:
        """What the source contains."""
        return self._info

    @property
    def examples(self) -> int:
        """How many examples the rows hold: one each."""
        return len(self)

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> TextRow:
        one = [(self.documents[index], int(self.documents.task_N[index]))]
        return fill(one, self.info.length, self.info.pad, self.trained)

    def epoch(self, number: int) -> TextSource:
        """The same rows in every epoch."""
        return self


def check_length(documents: Encodings, length: int) -> None:
    """Raise ValueError if documents were encoded for longer rows."""
    if documents.sizes_N.max() > length:
        raise ValueError(f"documents of {documents.sizes_N.max()} places in rows of {length}")


def info_of(documents: Encodings, length: int, name: str, split: str) -> TextInfo:
    """The description of a source of rows made of these documents."""
    return TextInfo(name, split, documents.tasks, documents.vocabulary, length, documents.pad)


def stack(rows: Sequence[TextRow]) -> Batch:
    """The rows as int32 arrays [B,T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class TextTraining:
    """Training batches of `size` rows (all hosts together)."""

    def __init__(self, source: TextSource, size: int, seed: int):
        if size < 1:
            raise UserError(f"The batch size is {size}; it must be at least 1.")
        self.source, self.size, self.seed = source, size, seed

    def places(self, step: int, rows: Sequence[int]) -> list[tuple[int, int]]:
        """Epoch and number of the source's rows for these rows of the global batch."""
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

    The last batch is filled up with padding rows; `valid` bool [B] is False there.
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
