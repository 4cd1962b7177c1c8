"""Several short examples in one row: first fit in a window of open rows.

The plan, which sizes share a row, depends only on the sizes and the seed and is made once. Each
epoch then deals the documents of each size anew over the places of that size. So every epoch has
the same number of rows, row i of epoch e is known without any other, and no document is ever cut,
left out or repeated.

Documents in one row do not see each other, so what shares a row matters only to which examples make
up a batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from moezoo.domains.text.data.encode import Encodings, TrainedTokens, answers_only
from moezoo.domains.text.data.rows import TextInfo, TextRow, check_length, fill, info_of

WINDOW = 128  # rows that are open at a time


def generator(seed: int, *words: int) -> np.random.Generator:
    """Random numbers that depend on the seed and up to three numbers."""
    key = np.random.SeedSequence([seed % 2**63, *words])
    return np.random.Generator(np.random.Philox(key))


def first_fit(sizes_N: np.ndarray, length: int, window: int = WINDOW) -> np.ndarray:
    """The row of each document, int64 [N], taken in order; rows are numbered without gaps.

    A document goes to the first of at most `window` open rows that has room; if none has, the
    fullest row is closed and an empty one opened. Raises ValueError for a size above `length`.
    """
    if len(sizes_N) and sizes_N.max() > length:
        raise ValueError(f"a document of {sizes_N.max()} places in rows of {length}")
    room_W = np.zeros(window, np.int64)
    row_W = np.zeros(window, np.int64)
    rows_N = np.empty(len(sizes_N), np.int64)
    opened = 0
    for index, size in enumerate(sizes_N.tolist()):
        place = (room_W >= size).argmax()
        if room_W[place] < size:
            place = opened if opened < window else room_W.argmin()
            room_W[place], row_W[place] = length, opened
            opened += 1
        room_W[place] -= size
        rows_N[index] = row_W[place]
    return rows_N


class Packed:
    """Rows with as many examples as fit; `Packed(...).epoch(e)` deals them for that epoch."""

    def __init__(
        self,
        documents: Encodings,
        length: int,
        seed: int,
        name: str,
        split: str,
        trained: TrainedTokens = answers_only,
        window: int = WINDOW,
    ):
        check_length(documents, length)
        self.documents, self.seed, self.trained = documents, seed, trained
        self._info = info_of(documents, length, name, split)
        order = generator(seed).permutation(len(documents))
        rows = first_fit(documents.sizes_N[order], length, window)
        by_row = np.argsort(rows, kind="stable")
        # Place p of the plan is for a document of sizes[p]; the places of row i begin at starts[i].
        sizes = documents.sizes_N[order][by_row]
        self._places_by_size = np.argsort(sizes, kind="stable")
        self._starts = np.cumsum([0, *np.bincount(rows)])
        self._dealt = lru_cache(4)(self._deal)

    @property
    def info(self) -> TextInfo:
        """What the source contains."""
        return self._info

    @property
    def examples(self) -> int:
        """How many examples the rows hold."""
        return len(self.documents)

    @property
    def density(self) -> float:
        """The share of places that hold a token."""
        return float(self.documents.sizes_N.sum() / (len(self) * self.info.length))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> TextRow:
        return self.row(0, index)

    def epoch(self, number: int) -> _Epoch:
        """The rows of an epoch."""
        return _Epoch(self, number)

    def _deal(self, epoch: int) -> np.ndarray:
        """The document at each place of the plan, int64 [N]."""
        sizes = self.documents.sizes_N
        shuffled = generator(self.seed, 1, epoch).permutation(len(sizes))
        documents = np.empty(len(sizes), np.int64)
        documents[self._places_by_size] = shuffled[np.argsort(sizes[shuffled], kind="stable")]
        return documents

    def members(self, epoch: int, index: int) -> np.ndarray:
        """The documents of a row in an epoch, in order."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._dealt(epoch)[self._starts[index] : self._starts[index + 1]]

    def row(self, epoch: int, index: int) -> TextRow:
        """A row of an epoch."""
        chosen = [
            (self.documents[i], int(self.documents.task_N[i]))
            for i in self.members(epoch, index).tolist()
        ]
        return fill(chosen, self.info.length, self.info.pad, self.trained)


class _Epoch:
    """The rows of one epoch of a `Packed` source."""

    def __init__(self, packed: Packed, number: int):
        self.packed, self.number = packed, number

    @property
    def info(self) -> TextInfo:
        return self.packed.info

    @property
    def examples(self) -> int:
        return self.packed.examples

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, index: int) -> TextRow:
        return self.packed.row(self.number, index)

    def epoch(self, number: int) -> _Epoch:
        return self.packed.epoch(number)
