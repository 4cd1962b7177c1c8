"""Instruction tasks without a download: short questions with exact answers that conflict.

Every task of `rules.RULES` sees the same kind of input, so that only the instruction says what to
do with it. Example number i of a seed and a split is always the same, on every machine. The hash of
an input decides its split: no test input occurs in training, in any task and with any seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from random import Random
from zlib import crc32

from moezoo.data.text.example import Instruction
from moezoo.data.text.rules import RULES, Draw, numbers, phrase, pick
from moezoo.errors import UserError, unknown

SPLITS = ("train", "test")
TEST = 5  # one input in so many
ATTEMPTS = 10_000

TASKS = tuple(RULES)


def split_of(text: str) -> str:
    """The split that an input belongs to."""
    return "test" if crc32(text.encode()) % TEST == 0 else "train"


class Instructions:
    """`count` examples, the tasks in turn: example i has task i mod the number of tasks.

    `words` draws the inputs of the tasks on words (`rules.phrase`: pseudo-words; also
    `rules.phrases_of`). Raises UserError for unknown names, and in `[]` where hardly any draw
    belongs to the split.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        split: str,
        tasks: Iterable[str] = TASKS,
        words: Draw = phrase,
    ):
        chosen = set(tasks)
        for name in sorted(chosen - set(TASKS)):
            raise unknown("instruction task", name, list(TASKS))
        if split not in SPLITS:
            raise unknown("split", split, list(SPLITS))
        if count < 1 or not chosen:
            raise UserError(f"{count} examples of {len(chosen)} tasks: both must be at least 1.")
        self.count, self.seed, self.split = count, seed, split
        self.tasks = tuple(sorted(chosen))
        self._draws: dict[str, Draw] = {"words": words, "numbers": numbers}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Instruction:
        if not 0 <= index < self.count:
            raise IndexError(f"example {index} of {self.count}")
        task = self.tasks[index % len(self.tasks)]
        rule = RULES[task]
        rng = Random(f"{self.seed} {self.split} {index}")
        wording = pick(rule.wordings, rng)
        draw = partial(self._draws[rule.inputs], rng)
        for _ in range(ATTEMPTS):
            text = draw()
            if split_of(text) == self.split and (answer := rule.answer(text)):
                return Instruction(wording, text, answer, task)
        raise UserError(
            f"None of {ATTEMPTS} drawn inputs has an answer in the {self.split} split of task "
            f"{task}: give more words to draw from."
        )
