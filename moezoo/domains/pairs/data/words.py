"""Sentences of a small language as token ids, one token per word."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from moezoo.errors import UserError

PAD, MASK, START, END = range(4)
MARKS = ("<pad>", "<mask>", "<start>", "<end>")

PATTERN = r"[a-z]+|\d+|[^\sa-z\d]"  # a word, in lower case


def split(text: str) -> list[str]:
    """The words and signs of a text, in lower case."""
    return re.findall(PATTERN, text.lower())


class Vocabulary:
    """A closed vocabulary: `MARKS` first, then words in alphabetic order."""

    def __init__(self, words: Iterable[str]):
        self.words = (*MARKS, *sorted(set(words) - set(MARKS)))
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, texts: Iterable[str]) -> Vocabulary:
        """The words that occur in the texts."""
        return cls(word for text in texts for word in split(text))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The ids of a text's words, no marks added; UserError names a word it does not know."""
        found = split(text)
        for word in found:
            if word not in self._ids:
                raise UserError(
                    f"The word {word!r} of {text!r} is none of the {len(self)} that this model "
                    "learned: write it with words of its captions."
                )
        return [self._ids[word] for word in found]

    def decode(self, ids: Iterable[int]) -> str:
        """The text up to the end mark, marks left out, signs next to their words."""
        words = []
        for i in ids:
            if i == END:
                break
            if i >= len(MARKS):
                words.append(self.words[int(i)])
        return re.sub(r" ([.,])", r"\1", " ".join(words))

    def rows(self, texts: Sequence[str], length: int | None = None) -> np.ndarray:
        """int32 [texts, length], filled up with `PAD`; UserError if a text is longer.

        length: default: that of the longest text.
        """
        ids = [self.encode(text) for text in texts]
        longest = max(map(len, ids), default=0)
        length = longest if length is None else length
        if longest > length:
            text = texts[[len(row) for row in ids].index(longest)]
            raise UserError(f"{text!r} has {longest} words; there is room for {length}.")
        made = np.full((len(ids), length), PAD, np.int32)
        for row, own in zip(made, ids, strict=True):
            row[: len(own)] = own
        return made
