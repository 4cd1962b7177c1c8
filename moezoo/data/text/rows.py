"""Rows: the arrays of fixed length that models read, and the sources that give them.

A row has, int32 [T] each: `tokens`; `targets`, the next token of the same document, -1 where there
is no loss; `segments`, 0 for padding and 1, 2, ... for the documents; `positions`, from 0 in each
document; `task`, that of the token's document, 0 for padding. A document of n tokens takes n - 1
places: its last token is a target only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moezoo.data.text.encode import Encoded, Encodings, Trained, answers_only

Row = dict[str, np.ndarray]
IGNORE = -1  # a target without loss


@dataclass(frozen=True)
class TextInfo:
    """What a source of rows holds: task names in the order of their numbers, sizes."""

    name: str
    split: str
    tasks: tuple[str, ...]
    vocabulary: int
    length: int
    pad: int


class TextSource(Protocol):
    """Rows by index; `epoch` gives the same number of rows, perhaps arranged in another way."""

    @property
    def info(self) -> TextInfo: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...

    def epoch(self, number: int) -> TextSource: ...


def blank(length: int, pad: int) -> Row:
    """A row of nothing but padding."""
    row = {
        name: np.zeros(length, np.int32)
        for name in ("tokens", "targets", "segments", "positions", "task")
    }
    row["tokens"][:] = pad
    row["targets"][:] = IGNORE
    return row


def fill(documents: Sequence[tuple[Encoded, int]], length: int, pad: int, trained: Trained) -> Row:
    """A row with these (document, task) one behind the other; ValueError where they do not fit."""
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
        trained: Trained = answers_only,
    ):
        check_length(documents, length)
        self.documents, self.trained = documents, trained
        self._info = info_of(documents, length, name, split)

    @property
    def info(self) -> TextInfo:
        """What the source holds."""
        return self._info

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Row:
        one = [(self.documents[index], int(self.documents.task_N[index]))]
        return fill(one, self.info.length, self.info.pad, self.trained)

    def epoch(self, number: int) -> TextSource:
        """The same rows in every epoch."""
        return self


def check_length(documents: Encodings, length: int) -> None:
    """ValueError where documents were encoded for longer rows."""
    if documents.sizes_N.max() > length:
        raise ValueError(f"documents of {documents.sizes_N.max()} places in rows of {length}")


def info_of(documents: Encodings, length: int, name: str, split: str) -> TextInfo:
    """The description of a source of rows made of these documents."""
    return TextInfo(name, split, documents.tasks, documents.vocabulary, length, documents.pad)
