"""Small rules on strings that conflict: one input, a different exact answer under each rule.

Inputs are one to three words of at most `LONGEST` characters together, or two numbers. Nothing but
`Random.random` is drawn from, whose sequence Python promises to keep in all versions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TypeVar

LONGEST = 8
LARGEST = 99  # of the numbers

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
    """One to three words with a space between them, no more than `LONGEST` characters."""
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
    """Two numbers of at most `LARGEST`."""
    return f"{int(rng.random() * (LARGEST + 1))} {int(rng.random() * (LARGEST + 1))}"


@dataclass(frozen=True)
class Rule:
    """Ways to ask for it, its answer to an input, and which inputs it takes: words or numbers."""

    wordings: tuple[str, ...]
    answer: Callable[[str], str]
    inputs: str = "words"


def shift(text: str, by: int) -> str:
    """Letters a to z moved along the alphabet, z before a; everything else stays."""
    return "".join(
        chr((ord(c) - ord("a") + by) % 26 + ord("a")) if "a" <= c <= "z" else c for c in text
    )


def swap_halves(text: str) -> str:
    """The second half, then the first, which has the middle character."""
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


def _numeric(wordings: tuple[str, ...], answer: Callable[[int, int], int]) -> Rule:
    return Rule(wordings, lambda text: str(answer(*two(text))), "numbers")


RULES: dict[str, Rule] = {
    "add": _numeric(("add", "sum of", "plus"), lambda a, b: a + b),
    "compare": Rule(("compare", "which sign", "less or more"), compare, "numbers"),
    "copy": Rule(("copy", "repeat", "say again"), str),
    "count_a": Rule(("count a", "how many a", "number of a"), lambda t: str(t.count("a"))),
    "double": Rule(("double letters", "each twice", "stutter"), _double),
    "initials": Rule(("initials", "first letters", "word heads"), _initials),
    "larger": _numeric(("larger", "the bigger", "maximum"), max),
    "last_word": Rule(("last word", "final word", "word at end"), lambda t: t.split()[-1]),
    "next": Rule(("next letters", "shift up", "one later"), partial(shift, by=1)),
    "no_vowels": Rule(
        ("no vowels", "drop vowels", "consonants"), partial(_without, letters="aeiou")
    ),
    "previous": Rule(("letters before", "shift down", "one earlier"), partial(shift, by=-1)),
    "reverse": Rule(("reverse", "backwards", "mirror"), lambda t: t[::-1]),
    "sort": Rule(("sort letters", "in order", "alphabetic"), lambda t: "".join(sorted(t)).strip()),
    "subtract": _numeric(("subtract", "minus", "difference"), lambda a, b: a - b),
    "swap_halves": Rule(("swap halves", "halves round", "end first"), swap_halves),
    "upper": Rule(("upper case", "capitals", "shout"), str.upper),
    "vowels": Rule(("vowels", "only vowels", "drop others"), _vowels),
}
