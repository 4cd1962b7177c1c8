"""Instruction tasks that need no download: short questions with exact answers that conflict.

Every task in `RULES`, and in `UNSEEN` and `COMPOSED`, which are generated where they are named,
sees the same kind of input, one to three words of at most `LONGEST` characters together or two
numbers, so that only the instruction says what to do with it. Example number i of a seed and a
split is the same on every machine: all draws come from `Random.random`, whose sequence Python
promises to keep in all versions. The hash of an input decides its split: no test input occurs in
training, in any task and with any seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TypeVar
from zlib import crc32

from moezoo.domains.text.data.example import Instruction
from moezoo.errors import UserError, unknown

LONGEST = 8
LARGEST = 99  # largest number

_T = TypeVar("_T")
Draw = Callable[[Random], str]


def pick(choices: Sequence[_T], rng: Random) -> _T:
    """One of the choices, all equally likely."""
    return choices[int(rng.random() * len(choices))]


def pseudo_word(rng: Random) -> str:
    """One or two syllables: "ka", "tuso", "misa"."""
    return "".join(
        pick("bcdfghjklmnprstvwz", rng) + pick("aeiou", rng) for _ in range(pick((1, 2, 2), rng))
    )


def phrase(rng: Random, word: Draw = pseudo_word) -> str:
    """One to three words separated by spaces, of at most `LONGEST` characters together."""
    text = word(rng)
    for _ in range(pick(range(3), rng)):
        longer = f"{text} {word(rng)}"
        if len(longer) > LONGEST:
            break
        text = longer
    return text[:LONGEST].rstrip()


def phrases_of(words: Sequence[str]) -> Draw:
    """`phrase` with words from a list, for example those of `corpus.words`."""
    return partial(phrase, word=partial(pick, words))


def numbers(rng: Random) -> str:
    """Two numbers, each at most `LARGEST`."""
    return f"{int(rng.random() * (LARGEST + 1))} {int(rng.random() * (LARGEST + 1))}"


@dataclass(frozen=True)
class InstructionRule:
    """Ways to ask for it, its answer to an input, and the inputs it takes: words or numbers."""

    wordings: tuple[str, ...]
    answer: Callable[[str], str]
    inputs: str = "words"


def shift(text: str, by: int) -> str:
    """Letters a to z moved along the alphabet, wrapping around; everything else stays."""
    return "".join(
        chr((ord(c) - ord("a") + by) % 26 + ord("a")) if "a" <= c <= "z" else c for c in text
    )


def swap_halves(text: str) -> str:
    """The second half, then the first, which includes the middle character."""
    middle = (len(text) + 1) // 2
    return text[middle:] + text[:middle]


def two(text: str) -> tuple[int, int]:
    """The two numbers of an input."""
    first, second = text.split()
    return int(first), int(second)


def compare(text: str) -> str:
    """The sign between the two numbers: <, = or >."""
    first, second = two(text)
    return "<" if first < second else ">" if first > second else "="


def _double(text: str) -> str:
    return "".join(c if c == " " else c + c for c in text)


def _initials(text: str) -> str:
    return "".join(word[0] for word in text.split())


def _without(text: str, letters: str) -> str:
    return "".join(c for c in text if c not in letters)


def _vowels(text: str) -> str:
    return "".join(c for c in text if c in "aeiou")


def _numeric(wordings: tuple[str, ...], answer: Callable[[int, int], int]) -> InstructionRule:
    return InstructionRule(wordings, lambda text: str(answer(*two(text))), "numbers")


RULES: dict[str, InstructionRule] = {
    "add": _numeric(("add", "sum of", "plus"), lambda a, b: a + b),
    "compare": InstructionRule(("compare", "which sign", "less or more"), compare, "numbers"),
    "copy": InstructionRule(("copy", "repeat", "say again"), str),
    "count_a": InstructionRule(
        ("count a", "how many a", "number of a"), lambda t: str(t.count("a"))
    ),
    "double": InstructionRule(("double letters", "each twice", "stutter"), _double),
    "initials": InstructionRule(("initials", "first letters", "word heads"), _initials),
    "larger": _numeric(("larger", "the bigger", "maximum"), max),
    "last_word": InstructionRule(
        ("last word", "final word", "word at end"), lambda t: t.split()[-1]
    ),
    "next": InstructionRule(("next letters", "shift up", "one later"), partial(shift, by=1)),
    "no_vowels": InstructionRule(
        ("no vowels", "drop vowels", "consonants"), partial(_without, letters="aeiou")
    ),
    "previous": InstructionRule(
        ("letters before", "shift down", "one earlier"), partial(shift, by=-1)
    ),
    "reverse": InstructionRule(("reverse", "backwards", "mirror"), lambda t: t[::-1]),
    "sort": InstructionRule(
        ("sort letters", "in order", "alphabetic"), lambda t: "".join(sorted(t)).strip()
    ),
    "subtract": _numeric(("subtract", "minus", "difference"), lambda a, b: a - b),
    "swap_halves": InstructionRule(("swap halves", "halves round", "end first"), swap_halves),
    "upper": InstructionRule(("upper case", "capitals", "shout"), str.upper),
    "vowels": InstructionRule(("vowels", "only vowels", "drop others"), _vowels),
}


# Of the same inputs, and in no default data set: for what a model does that never saw them.
UNSEEN: dict[str, InstructionRule] = {
    "count_e": InstructionRule(
        ("count e", "how many e", "number of e"), lambda t: str(t.count("e"))
    ),
    "first_word": InstructionRule(
        ("first word", "initial word", "word at start"), lambda t: t.split()[0]
    ),
    "no_a": InstructionRule(("no a", "drop a", "without a"), partial(_without, letters="a")),
    "smaller": _numeric(("smaller", "the lesser", "minimum"), min),
}


def _then(first: str, second: str) -> InstructionRule:
    """One task, and another one on its answer, in one instruction."""
    one, other = RULES[first], RULES[second]
    wordings = tuple(f"{a} then {b}" for a, b in zip(one.wordings, other.wordings, strict=True))
    # An empty answer is none, as of every task; nothing can be done to it either.
    return InstructionRule(
        wordings, lambda t: other.answer(a) if (a := one.answer(t)) else "", one.inputs
    )


PAIRS = (
    ("double", "no_vowels"),
    ("last_word", "double"),
    ("no_vowels", "previous"),
    ("previous", "sort"),
    ("sort", "swap_halves"),
    ("swap_halves", "last_word"),
)
COMPOSED = {f"{first}_then_{second}": _then(first, second) for first, second in PAIRS}
KNOWN = RULES | UNSEEN | COMPOSED


SPLITS = ("train", "test")
TEST = 5  # one input in this many
ATTEMPTS = 10_000

TASKS = tuple(RULES)


def split_of(text: str) -> str:
    """The split that an input belongs to."""
    return "test" if crc32(text.encode()) % TEST == 0 else "train"


class Instructions:
    """`count` examples, cycling through the tasks: example i has task i mod the number of tasks.

    `words` draws the inputs of the tasks on words (`rules.phrase`: pseudo-words; also
    `rules.phrases_of`). Raises UserError for unknown names, and in `[]` if hardly any draw
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
        for name in sorted(chosen - set(KNOWN)):
            raise unknown("instruction task", name, list(KNOWN))
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
        rule = KNOWN[task]
        rng = Random(f"{self.seed} {self.split} {index}")
        wording = pick(rule.wordings, rng)
        draw = partial(self._draws[rule.inputs], rng)
        for _ in range(ATTEMPTS):
            text = draw()
            if split_of(text) == self.split and (answer := rule.answer(text)):
                return Instruction(wording, text, answer, task)
        raise UserError(
            f"None of {ATTEMPTS} drawn inputs has an answer in the {self.split} split of task "
            f"{task}: provide more words to draw from."
        )
