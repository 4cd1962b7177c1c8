"""From examples to token ids, with answers marked, cut to a maximum length.

An example that does not fit loses tokens from the middle of the text before its last answer: the
instruction usually stands at the beginning and the end of the question next to the answer, so both
are kept. The last answer is never cut; an example with fewer than `PROMPT` tokens left before it
would be refused, and counted. In an example that was cut, only the last answer counts as an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moezoo.domains.text.data.example import Template, TextExamples, TextPiece, Turn, plain
from moezoo.domains.text.data.tokenizer import Tokenizer
from moezoo.errors import UserError

PROMPT = 8  # tokens, including the begin token


class EncodedDocument(NamedTuple):
    """A document: `tokens` int32 [n], `answer` bool [n], and the first token after a cut.

    `joint` is 0 if nothing was cut (token 0 is no target anyway).
    """

    tokens: np.ndarray
    answer: np.ndarray
    joint: int = 0


TrainedTokens = Callable[[EncodedDocument], np.ndarray]


def answers_only(document: EncodedDocument) -> np.ndarray:
    """The tokens that the loss covers, bool [n]: answers with their end tokens."""
    return document.answer


def everything(document: EncodedDocument) -> np.ndarray:
    """The tokens that the loss covers, bool [n]: all but the one after a cut."""
    return np.arange(len(document.tokens)) != (document.joint or -1)


def encode(
    pieces: Sequence[TextPiece], tokenizer: Tokenizer, longest: int
) -> EncodedDocument | None:
    """The pieces of an example as at most `longest` tokens; None if its answer does not fit.

    Raises ValueError if the last piece is not an answer, UserError if the tokenizer lacks a mark.
    """
    if not pieces or not pieces[-1].answer:
        raise ValueError("the last piece of an example must be an answer")
    ids: list[int] = []
    answer: list[bool] = []
    if tokenizer.bos is not None:
        ids.append(tokenizer.bos)
        answer.append(False)
    for piece in pieces:
        own = tokens_of(piece, tokenizer)
        ids += own
        answer += [piece.answer] * len(own)
    whole = EncodedDocument(np.array(ids, np.int32), np.array(answer, bool))
    return whole if len(ids) <= longest else _cut(whole, longest)


def tokens_of(piece: TextPiece, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a piece, with the end token if one follows.

    Raises UserError if the tokenizer has no token for one of its marks.
    """
    for mark in piece.marks:
        tokenizer.mark(mark)
    return tokenizer.encode(piece.text) + [tokenizer.eos] * piece.end


def ends(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end an answer: the template's, and the one that ends every text.

    Raises UserError if the template and the tokenizer do not fit together.
    """
    turns = (Turn("user", "a"), Turn("assistant", "a"))
    last = [tokens_of(piece, tokenizer) for piece in template(turns)][-1]
    marked = template(turns)[-1]
    own = last[-1:] if marked.end or marked.marks else []
    return tuple(dict.fromkeys([*own, tokenizer.eos]))


def _cut(document: EncodedDocument, longest: int) -> EncodedDocument | None:
    tokens, answer, _ = document
    last = int(np.flatnonzero(np.r_[True, ~answer])[-1])  # where the last answer begins
    room = longest - (len(tokens) - last)
    if room < PROMPT:
        return None
    head = (room + 1) // 2
    kept = np.r_[:head, last - (room - head) : len(tokens)]
    return EncodedDocument(tokens[kept], kept >= last, head)


@dataclass(frozen=True)
class Encodings:
    """Documents in flat arrays: tokens of document i at starts_N1[i] to starts_N1[i + 1].

    `tasks` are the names that task_N numbers; `refused` counts examples whose answers do not fit.
    """

    tokens: np.ndarray
    answer: np.ndarray
    starts_N1: np.ndarray
    joint_N: np.ndarray
    task_N: np.ndarray
    tasks: tuple[str, ...]
    vocabulary: int
    pad: int
    longest: int
    refused: int = 0

    def __len__(self) -> int:
        return len(self.task_N)

    def __getitem__(self, index: int) -> EncodedDocument:
        here = slice(self.starts_N1[index], self.starts_N1[index + 1])
        return EncodedDocument(self.tokens[here], self.answer[here], int(self.joint_N[index]))

    @property
    def sizes_N(self) -> np.ndarray:
        """The places that each document takes in a row, int64 [N]: its last token is no input."""
        return np.diff(self.starts_N1) - 1


def encode_all(
    examples: TextExamples, tokenizer: Tokenizer, length: int, template: Template = plain
) -> Encodings:
    """Encode examples for rows of `length` tokens; a document has at most length + 1.

    Raises UserError if every example is refused.
    """
    numbers = {name: j for j, name in enumerate(examples.tasks)}
    documents, tasks = [], []
    for index in range(len(examples)):
        example = examples[index]
        document = encode(template(example.turns), tokenizer, length + 1)
        if document is not None:
            documents.append(document)
            tasks.append(numbers[example.task])
    if not documents:
        raise UserError(
            f"None of {len(examples)} examples has an answer that fits in rows of {length} tokens: "
            "make the rows longer."
        )
    return Encodings(
        np.concatenate([d.tokens for d in documents]),
        np.concatenate([d.answer for d in documents]),
        np.cumsum([0, *(len(d.tokens) for d in documents)], dtype=np.int64),
        np.array([d.joint for d in documents], np.int32),
        np.array(tasks, np.int32),
        tuple(examples.tasks),
        tokenizer.vocabulary,
        tokenizer.pad,
        length + 1,
        len(examples) - len(documents),
    )
