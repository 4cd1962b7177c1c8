"""What is known of every side of every task: attributes, and whether its text is read causally.

A table is a tuple of lines, `"caption|input causal 11011000 11010101"`: a name `task|side`, the
word "causal" where the tokens of the text see only what stands before them, and one row of
attributes, or two: the first for the special token and the first part (an image), the second for
the text behind it. A set of targets that several tasks share has a name without a side.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.errors import UserError, unknown

# Uni-Perceiver-MoE's released table. The bits, as far as the table tells: the task's input has
# something visual, something textual; its target is visual, textual; this token is visual, textual;
# it belongs to the targets; it is read causally.
IMAGE, TEXT = "10011000", "01010100"
CAPTION = "11011000 11010101"
NAMES, WORDS = "10010110", "11010110"

PUBLISHED: tuple[str, ...] = (
    f"image_classification|input {IMAGE}",
    f"video_classification|input {IMAGE}",
    f"text_mlm|input {TEXT}",
    f"image_caption|input causal {CAPTION}",
    f"video_caption|input causal {CAPTION}",
    f"image_retrieval|input {IMAGE}",
    f"image_retrieval|target {NAMES}",
    f"video_retrieval|input {IMAGE}",
    f"video_retrieval|target {NAMES}",
    f"text_classification|input {TEXT}",
    *(f"{data} {NAMES}" for data in ("ImageNet1k", "ImageNet22k", "MomentsInTime")),
    *(f"{data} {NAMES}" for data in ("Kinetics700", "Kinetics400")),
    f"Vocab_Word {WORDS}",
    *(f"{data}-target {WORDS}" for data in ("CoLA", "MNLI", "MRPC", "QNLI", "QQP", "RTE", "SST-2")),
)

# The same kinds of task on rooms. `counts` is text-to-scene retrieval that training may leave out:
# all its attributes occur in other tasks.
ROOMS: tuple[str, ...] = (
    f"scene|input {IMAGE}",
    f"scene|target {NAMES}",
    f"caption|input causal {CAPTION}",
    f"caption|target {WORDS}",
    f"retrieval|input {IMAGE}",
    f"retrieval|target {NAMES}",
    f"mlm|input {TEXT}",
    f"mlm|target {WORDS}",
    f"text_scene|input {TEXT}",
    f"text_scene|target {WORDS}",
    f"counts|input {IMAGE}",
    f"counts|target {NAMES}",
)


class ConditionSide(NamedTuple):
    """One side of a task: its name, its task, attributes float32 [R, A], how its text is read."""

    name: str
    task: str
    rows_RA: np.ndarray
    causal: bool


class ConditionTable:
    """The sides by name.

    Raises UserError for a line that cannot be read, a name that stands twice, attribute rows of
    different lengths, and an empty table.
    """

    def __init__(self, lines: Sequence[str]):
        if not lines:
            raise UserError("The table of conditions is empty: give at least one line.")
        self.entries: dict[str, ConditionSide] = {}
        for line in lines:
            entry = _entry(line)
            if entry.name in self.entries:
                raise UserError(f"The table of conditions has {entry.name} twice.")
            self.entries[entry.name] = entry
        first = next(iter(self.entries.values()))
        for entry in self.entries.values():
            _check_length(entry, first)
        self.length = first.rows_RA.shape[1]
        self.tasks = tuple(dict.fromkeys(entry.task for entry in self.entries.values()))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all sides, in the order of the lines."""
        return tuple(self.entries)

    def entry(self, name: str) -> ConditionSide:
        """The side called `name`; raises UserError where it has no attributes."""
        if name not in self.entries:
            says = unknown("condition", name, list(self.entries))
            raise UserError(f"{says} The table of conditions gives attributes to each of them.")
        return self.entries[name]

    def check_task(self, task: str) -> None:
        """Raise UserError where no line gives attributes to a task."""
        if task not in self.tasks:
            raise UserError(
                f"Task {task} has no attributes: add lines '{task}|input ...' and '{task}|target "
                f"...' to the table of conditions, which has {', '.join(self.tasks)}."
            )

    def distinct(self) -> np.ndarray:
        """The different rows of attributes, in the order in which they occur; [R, A]."""
        rows = [tuple(row) for entry in self.entries.values() for row in entry.rows_RA]
        return np.asarray(list(dict.fromkeys(rows)), np.float32)


@cache
def table_of(lines: tuple[str, ...]) -> ConditionTable:
    """The table of these lines, read once."""
    return ConditionTable(lines)


class Mixed(NamedTuple):
    """A batch under several conditions: example b is under `names[which_B[b]]`; int32 [B]."""

    names: tuple[str, ...]
    which_B: Array


def check_mixed(mixed: Mixed, batch: int) -> None:
    """Raise UserError for a mixed batch without conditions, or whose numbers are not theirs."""
    shape, count = jnp.shape(mixed.which_B), len(mixed.names)
    if not count:
        raise UserError("This mixed batch names no condition: give at least one of the table.")
    if shape != (batch,):
        raise UserError(
            f"The conditions of a mixed batch have shape {shape}, but there are {batch} examples: "
            "number one of the names for each."
        )
    try:
        which_B = np.asarray(mixed.which_B)
    # Inside a compiled function nobody knows the numbers.
    except jax.errors.TracerArrayConversionError:
        return
    wrong = which_B[(which_B < 0) | (which_B >= count)]
    if wrong.size:
        raise UserError(
            f"An example is under condition number {wrong[0]} of a mixed batch that names {count}: "
            f"count from 0 to {count - 1}."
        )


def one_condition(names: Sequence[str]) -> str:
    """The condition of a batch that names one per example; raises UserError where they differ."""
    different = list(dict.fromkeys(names))
    if len(different) != 1:
        said = f"mixes the conditions {' and '.join(different)}" if different else "is empty"
        raise UserError(
            f"This batch {said}, but one condition was promised for all of it: make one batch per "
            "condition, or say with Mixed which example is under which."
        )
    return different[0]


def _entry(line: str) -> ConditionSide:
    name, *words = line.split() or [""]
    causal = words[:1] == ["causal"]
    bits = words[causal:]
    if not name or len(bits) not in (1, 2) or any(set(row) - set("01") for row in bits):
        raise UserError(
            f"'{line}' is no line of a table of conditions: write a name, perhaps the word causal, "
            "and one or two rows of zeros and ones, such as 'caption|input causal 1101 1001'."
        )
    if len({len(row) for row in bits}) > 1:
        raise UserError(f"The two attribute rows of {name} have {len(bits[0])} and {len(bits[1])} "
                        "entries; they must be equally long.")  # fmt: skip
    rows_RA = np.asarray([[float(bit) for bit in row] for row in bits], np.float32)
    return ConditionSide(name, name.partition("|")[0], rows_RA, causal)


def _check_length(entry: ConditionSide, first: ConditionSide) -> None:
    own, wanted = entry.rows_RA.shape[1], first.rows_RA.shape[1]
    if own != wanted:
        raise UserError(
            f"The attributes of {entry.name} have {own} entries, those of {first.name} {wanted}; "
            "all rows of a table of conditions must be equally long."
        )
