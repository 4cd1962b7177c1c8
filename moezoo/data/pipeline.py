"""Batches as a pure function of (seed, step): nothing to save, any number of hosts.

Row r of step s is example number s * B + r of one endless shuffled sequence, varied by random
numbers that depend on (seed, s, r) alone. A host reads only its rows of the global batch.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np

from moezoo.data.fit import fit
from moezoo.data.source import ArraySource, Batch, Info, Source, SourceExample, Transform
from moezoo.errors import UserError

Collate = Callable[[Sequence[SourceExample], Sequence[str], Info], Batch]
MakeTransforms = Callable[[Sequence[str], Info], Sequence[Transform]]
T = TypeVar("T")
THREADS = 16  # at most, for sources that decode pictures


@lru_cache(maxsize=1)
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(os.cpu_count() or 1, THREADS), "reader")


def _each(source: Source, work: Sequence[Callable[[], SourceExample]]) -> list[SourceExample]:
    """The results in order; computed by several threads if examples are decoded from disk."""
    if isinstance(getattr(source, "source", source), ArraySource):
        return [make() for make in work]
    return list(_readers().map(lambda make: make(), work))


def _read(source: Source, index: int) -> SourceExample:
    return fit(source[index], source.info)


@lru_cache(maxsize=4)
def shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order [count] in which an epoch visits the examples."""
    key = np.array([seed % 2**63, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(count)


class Training:
    """Training batches of `size` rows (all hosts together) from a source.

    `make` gives the transforms for the names in `augment`, and `stack` makes a batch of examples.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        seed: int,
        tasks: Sequence[str] | None,
        augment: Sequence[str],
        make: MakeTransforms,
        stack: Collate,
    ):
        if size < 1:
            raise UserError(f"The batch size is {size}; it must be at least 1.")
        self.source, self.size, self.seed = source, size, seed
        self.tasks = tuple(tasks or source.info.tasks)
        for task in self.tasks:
            if task not in source.info.tasks:  # augmentations leave extras as they are
                raise UserError(f"{source.info.name} has no labels for {task} to learn.")
        self.transforms, self.stack = make(augment, source.info), stack

    def indices(self, step: int, rows: Sequence[int]) -> list[int]:
        """The examples in these rows of the global batch."""
        count = len(self.source)
        places = [divmod(step * self.size + row, count) for row in rows]
        return [int(shuffled(self.seed, epoch, count)[place]) for epoch, place in places]

    def example(self, step: int, row: int, index: int) -> SourceExample:
        """One varied example."""
        example = fit(self.source[index], self.source.info)
        if self.transforms:
            extras = self.source.info.extras
            example = {name: value for name, value in example.items() if name not in extras}
            rng = np.random.Generator(np.random.Philox(key=_key(self.seed, step, row)))
            for transform in self.transforms:
                example = transform(example, rng)
        return example

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Batch:
        """The global batch of a step, or only some rows of it (see `host_rows`)."""
        rows = range(self.size) if rows is None else rows
        chosen = zip(rows, self.indices(step, rows), strict=True)
        work = [partial(self.example, step, row, index) for row, index in chosen]
        return self.stack(_each(self.source, work), self.tasks, self.source.info)

    def batches(
        self,
        start: int = 0,
        stop: int | None = None,
        rows: Sequence[int] | None = None,
        ahead: int = 2,
    ) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from `start` on, prepared by a thread up to `ahead` steps in advance."""
        return in_advance(lambda step: self.batch(step, rows), start, stop, ahead)


def _key(seed: int, step: int, row: int) -> np.ndarray:
    """A 128-bit key: seed and step in one word, the row in the other."""
    return np.array([(seed % 2**31) << 32 | step % 2**32, row], np.uint64)


def host_rows(size: int, process: int, processes: int) -> range:
    """The rows of a global batch that belong to one of several processes: a contiguous share.

    Raises UserError if the batch cannot be divided evenly.
    """
    if size % processes:
        raise UserError(f"The batch of {size} rows cannot be divided among {processes} processes.")
    share = size // processes
    return range(process * share, (process + 1) * share)


def evaluation(
    source: Source,
    size: int,
    tasks: Sequence[str] | None,
    rows: Sequence[int] | None,
    stack: Collate,
) -> Iterator[Batch]:
    """Every example once, in order, in batches of `size` rows (or some rows of each).

    Batches contain what `stack` makes, with `tasks`, which may also name the source's extras. The
    last one is filled up with the last example; `valid` bool [B] is False in those rows.
    """
    rows = range(size) if rows is None else rows
    names = tuple(tasks or source.info.tasks)
    last = len(source) - 1

    def produce() -> Iterator[Batch]:
        for start in range(0, len(source), size):
            wanted = [start + row for row in rows]
            work = [partial(_read, source, min(index, last)) for index in wanted]
            batch = stack(_each(source, work), names, source.info)
            yield batch | {"valid": np.array([index <= last for index in wanted])}

    return prefetch(produce(), 2)


def in_advance(
    batch: Callable[[int], T], start: int, stop: int | None, ahead: int
) -> Iterator[tuple[int, T]]:
    """(step, `batch(step)`) from `start` on, prepared by a thread up to `ahead` steps ahead."""

    def produce() -> Iterator[tuple[int, T]]:
        step = start
        while stop is None or step < stop:
            yield step, batch(step)
            step += 1

    return prefetch(produce(), ahead)


def prefetch(items: Iterator[T], ahead: int) -> Iterator[T]:
    """Draw items in a thread, at most `ahead` in advance; exceptions of the thread appear here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=max(ahead, 1))
    stop = threading.Event()

    def put(entry: tuple[str, Any]) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(("item", item))
                if stop.is_set():
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
