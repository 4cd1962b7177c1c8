"""Examples for instruction tuning and their templates: turns of a conversation, and its task.

A template is any function from the turns of an example to pieces of text, each either part of an
answer or not. Pieces are tokenized one by one, so that a prompt has the same tokens in training as
when it is given alone. A tokenizer recognises special tokens written out in a piece, even if users
wrote them; the marks of a template itself are refused there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moezoo.errors import UserError

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one of `ROLES` says."""

    role: str
    content: str


@dataclass(frozen=True)
class Instruction:
    """An instruction, the input it is about (may be empty), and its answer."""

    instruction: str
    input: str
    output: str
    task: str

    @property
    def turns(self) -> tuple[Turn, ...]:
        """One question, with instruction and input on separate lines, and one answer."""
        lines = [text for text in (self.instruction, self.input) if text]
        return Turn("user", "\n".join(lines)), Turn("assistant", self.output)


@dataclass(frozen=True)
class Chat:
    """A conversation whose last turn is the assistant's."""

    turns: tuple[Turn, ...]
    task: str


class TextExample(Protocol):
    """What templates read: `Instruction` or `Chat`."""

    @property
    def turns(self) -> tuple[Turn, ...]: ...

    @property
    def task(self) -> str: ...


class TextExamples(Protocol):
    """Random access to examples; `tasks` lists the names in the order of their numbers."""

    @property
    def tasks(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TextExample: ...


START, END = "<|im_start|>", "<|im_end|>"


class TextPiece(NamedTuple):
    """A text, whether it is an answer, and whether the end token follows (as part of it).

    `marks` are words in the text that must be single tokens: a tokenizer that would spell them out
    is refused.
    """

    text: str
    answer: bool
    end: bool = False
    marks: tuple[str, ...] = ()


Template = Callable[[Sequence[Turn]], list[TextPiece]]


def plain(turns: Sequence[Turn]) -> list[TextPiece]:
    """Every turn on its own line, without names; an answer is followed by the end token."""
    return [
        TextPiece(turn.content, True, end=True)
        if turn.role == "assistant"
        else TextPiece(f"{turn.content}\n", False)
        for turn in turns
    ]


def chatml(turns: Sequence[Turn]) -> list[TextPiece]:
    """ChatML, the form of Qwen's models: every turn, also an answer, ends in the token <|im_end|>.

    This holds whatever the tokenizer's own end token is (a base model has a different one). No
    system turn is added to an example without one. Raises UserError for a turn that has a mark.
    """
    pieces: list[TextPiece] = []
    for number, turn in enumerate(turns):
        for mark in (START, END):
            if mark in turn.content:
                raise UserError(
                    f"A turn of the {turn.role} has {mark} in its text, which the template chatml "
                    "inserts itself: remove the marks, or use --data.template plain."
                )
        after_answer = number > 0 and turns[number - 1].role == "assistant"
        head = "\n" * after_answer + f"{START}{turn.role}\n"
        if turn.role == "assistant":
            pieces.append(TextPiece(head, False, marks=(START,)))
            pieces += [TextPiece(turn.content, True), TextPiece(END, True, marks=(END,))]
        else:
            pieces.append(TextPiece(f"{head}{turn.content}{END}\n", False, marks=(START, END)))
    return pieces
