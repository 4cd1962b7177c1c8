"""Three disjoint sets of examples: to choose experts, to bound disagreement, to report scores."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from moezoo.data import pipeline
from moezoo.data.source import Info, Source, SourceExample
from moezoo.deploy.exporter import Exporter
from moezoo.errors import UserError


class RowRange:
    """Examples `start` to `stop` of a source."""

    def __init__(self, source: Source, start: int, stop: int):
        self.source, self.start, self.stop = source, start, stop

    @property
    def info(self) -> Info:
        """What the source holds."""
        return self.source.info

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> SourceExample:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        return self.source[self.start + index]


class Subset(NamedTuple):
    """Some examples under a name; `fingerprint` changes with the data set and with the choice.

    unit: what the examples are called.   stack: makes a batch of them.
    """

    source: RowRange
    where: str
    fingerprint: str
    unit: str
    stack: pipeline.Collate

    def batches(self, size: int, label: str) -> Iterator[dict[str, Any]]:
        """Every example once, as evaluation sees it; `valid` marks the filled-up rows."""
        size = min(size, len(self.source))
        return pipeline.evaluation(self.source, size, (label,), None, self.stack)

    def describe(self) -> dict[str, Any]:
        """The part as a certificate names it."""
        return {
            self.unit: len(self.source),
            "examples": self.where,
            "fingerprint": self.fingerprint,
        }


class Subsets(NamedTuple):
    """No example lies in two of them."""

    calibration: Subset
    verification: Subset
    test: Subset


def divide(exporter: Exporter, train: Source, test: Source, calibration: int) -> Subsets:
    """The first `calibration` training examples (at most all), and the two halves of the test ones.

    The model was fitted to training examples, so what is promised about new ones is measured on
    examples it has not seen. Raises UserError where there are too few.
    """
    if calibration < 1:
        raise UserError(f"{calibration} calibration examples: at least 1 is needed.")
    calibration = min(calibration, len(train))
    if len(test) < 2:
        raise UserError("A certificate needs at least two test examples.")
    half = len(test) // 2
    return Subsets(
        part(exporter, train, "train", 0, calibration),
        part(exporter, test, "test", 0, half),
        part(exporter, test, "test", half, len(test)),
    )


def part(exporter: Exporter, source: Source, split: str, start: int, stop: int) -> Subset:
    """Examples `start` to `stop` of a split."""
    fields = exporter.identity()
    content = {"data": fields, "split": split, "rows": [start, stop]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    where = f"{fields['name']} {split} [{start}:{stop}]"
    unit, rows = exporter.input.unit, RowRange(source, start, stop)
    return Subset(rows, where, digest, unit, exporter.stack)


def identity(section: Any) -> dict[str, Any]:
    """What a `data` section says about the examples that a split holds, as an `Exporter` gives it.

    Where files lie says nothing about what they hold, and what is cut out is never augmented.
    """
    found = dataclasses.asdict(section) | {"data_dir": None, "augment": ()}
    found.pop("archive", None)
    return found
