"""Continuous text for pretraining: documents joined by end tokens, cut into rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from moezoo.domains.text.data.corpus import Document
from moezoo.domains.text.data.rows import IGNORE, TextInfo, TextRow, TextSource, blank
from moezoo.domains.text.data.tokenizer import Tokenizer
from moezoo.errors import UserError, unknown


class Continuous:
    """Row i is tokens i * T to i * T + T of all documents: inputs, and targets one token later.

    A document is its text between the tokenizer's begin token (if it has one) and its end token.
    Rows overlap by the token that is a target in one and an input in the next, so every token
    except the first of each document is a target once. Parts of a document in different rows are
    separate documents: positions begin at 0, and they do not see each other. A token's task is its
    domain; `tasks` are the sorted names of those that occur, unless they are given.

    Raises UserError if there are fewer than two tokens, or a domain is not among those given.
    """

    def __init__(
        self,
        documents: Iterable[Document],
        tokenizer: Tokenizer,
        length: int,
        name: str,
        split: str,
        tasks: Sequence[str] | None = None,
    ):
        documents = list(documents)
        occurring = sorted({document.domain for document in documents})
        tasks = tuple(occurring if tasks is None else tasks)
        for domain in occurring:
            if domain not in tasks:
                raise unknown("text domain", domain, list(tasks))
        begin = [] if tokenizer.bos is None else [tokenizer.bos]
        texts = [
            np.array([*begin, *tokenizer.encode(d.text), tokenizer.eos], np.int32)
            for d in documents
        ]
        sizes = [len(text) for text in texts]
        if sum(sizes) < 2:
            raise UserError(f"The {split} split of {name} contains no text.")
        self.tokens = np.concatenate(texts)
        self.document = np.repeat(np.arange(len(texts), dtype=np.int32), sizes)
        self.task_N = np.array([tasks.index(d.domain) for d in documents], np.int32)
        self._info = TextInfo(name, split, tasks, tokenizer.vocabulary, length, tokenizer.pad)

    @property
    def info(self) -> TextInfo:
        """What the source contains."""
        return self._info

    @property
    def examples(self) -> None:
        """None: a text is cut anywhere."""

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // self.info.length)

    def __getitem__(self, index: int) -> TextRow:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        start = index * self.info.length
        stop = min(start + self.info.length, len(self.tokens) - 1)
        row = blank(self.info.length, self.info.pad)
        here = slice(0, stop - start)
        document = self.document[start : stop + 1]
        same = document[1:] == document[:-1]
        row["tokens"][here] = self.tokens[start:stop]
        row["targets"][here] = np.where(same, self.tokens[start + 1 : stop + 1], IGNORE)
        row["segments"][here] = document[:-1] - document[0] + 1
        places = np.arange(stop - start)
        begins = np.where(np.r_[True, ~same[:-1]], places, 0)
        row["positions"][here] = places - np.maximum.accumulate(begins)
        row["task"][here] = self.task_N[document[:-1]]
        return row

    def epoch(self, number: int) -> TextSource:
        """The same rows in every epoch."""
        return self
