"""Templates: from the turns of an example to pieces of text, each a part of an answer or not.

A template is any function of this form; pieces are tokenized one by one, so that a prompt has the
same tokens in training and when only it is given. A tokenizer recognises special tokens written
out in a piece, also in what users wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from moezoo.data.text.example import Turn


class Piece(NamedTuple):
    """A text, whether the model answers it, and whether the end token follows (as part of it)."""

    text: str
    answer: bool
    end: bool = False


Template = Callable[[Sequence[Turn]], list[Piece]]


def plain(turns: Sequence[Turn]) -> list[Piece]:
    """Every turn on its own line, without names; an answer is followed by the end token."""
    return [
        Piece(turn.content, True, end=True)
        if turn.role == "assistant"
        else Piece(f"{turn.content}\n", False)
        for turn in turns
    ]


def chatml(turns: Sequence[Turn]) -> list[Piece]:
    """ChatML, the form of Qwen's instruction models, whose end token is <|im_end|>.

    No system turn is made up where an example has none.
    """
    pieces: list[Piece] = []
    for number, turn in enumerate(turns):
        after_answer = number > 0 and turns[number - 1].role == "assistant"
        head = "\n" * after_answer + f"<|im_start|>{turn.role}\n"
        if turn.role == "assistant":
            pieces += [Piece(head, False), Piece(turn.content, True, end=True)]
        else:
            pieces.append(Piece(f"{head}{turn.content}<|im_end|>\n", False))
    return pieces
