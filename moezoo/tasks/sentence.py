"""A sentence for each example, word by word: BLEU, and sentences that are right to the last word.

Papineni, Roukos, Ward, Zhu: "BLEU: a Method for Automatic Evaluation of Machine Translation", ACL
2002, sections 2.1.2 and 2.2.2, with one reference for each sentence. Its counts are sums over all
sentences, so those of parts of a data set add up to those of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moezoo.label import ROWS
from moezoo.tasks.base import Metric, Scores, State, Task, ratio
from moezoo.tasks.language import cross_entropy, nothing
from moezoo.tasks.output import TaskOutput
from moezoo.tasks.painting import WordKey

LONGEST = 4  # words of the longest groups that are compared


@dataclass(frozen=True)
class WrittenWords:
    """How a row of numbers is a sentence: words by number.

    end: the number behind which a sentence is over.   marks: so many first words are never written;
    0 fills rows up.
    """

    words: tuple[str, ...]
    end: int
    marks: int

    def of(self, row: np.ndarray) -> list[int]:
        """The numbers that are written, up to the end."""
        ids = [int(i) for i in row]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        return [i for i in ids if i >= self.marks]


def said(logits_BTV: jax.Array) -> jax.Array:
    """The likeliest word of every place, int32 [B, T]; 0 where all logits are 0: nothing is there.

    logits_BTV: float32, 0 behind the end of a sentence.
    """
    there_BT = jnp.any(logits_BTV != 0, axis=-1)
    return jnp.where(there_BT, jnp.argmax(logits_BTV, axis=-1), 0).astype(jnp.int32)


@dataclass(frozen=True)
class Bleu(Metric):
    """BLEU-4 of all sentences together, and the share of sentences that are right word for word."""

    written: WrittenWords
    on_host: ClassVar[bool] = True

    def init(self) -> State:
        """Groups of 1 to 4 words: how many there are, and how many of them the truth has, too."""
        groups = {name: np.zeros(LONGEST, np.int64) for name in ("groups", "found")}
        counts = ("words", "true_words", "sentences", "right")
        return groups | {name: np.zeros((), np.int64) for name in counts}

    def count(self, logits_BHWC: Any, label: Any, valid_B: Any = None) -> State:
        """Sums of one batch from logits [B, T, V]; label: the true numbers, int32 [B, T]."""
        rows = np.asarray(said(jnp.asarray(logits_BHWC)))
        state = self.init()
        for i, (row, truth) in enumerate(zip(rows, np.asarray(label), strict=True)):
            if valid_B is None or np.asarray(valid_B)[i]:
                _add(state, self.written.of(row), self.written.of(truth))
        return state

    def compute(self, state: State) -> Scores:
        """bleu_4: geometric mean of the shares found, times the penalty for short sentences."""
        share = ratio(state["found"], state["groups"])
        short = np.exp(np.minimum(0.0, 1.0 - ratio(state["true_words"], state["words"])))
        with np.errstate(divide="ignore"):  # no group of some length is found: BLEU is 0
            mean = np.exp(np.mean(np.log(share)))
        return {
            "bleu_4": float(short * mean),
            "right": float(ratio(state["right"], state["sentences"])),
        }


def _add(state: State, words: Sequence[int], truth: Sequence[int]) -> None:
    for n in range(1, LONGEST + 1):
        own, true = _groups(words, n), _groups(truth, n)
        state["groups"][n - 1] += sum(own.values())
        # Clipped: a group counts no more often than the truth has it.
        state["found"][n - 1] += sum((own & true).values())
    state["words"] += len(words)
    state["true_words"] += len(truth)
    state["sentences"] += 1
    state["right"] += list(words) == list(truth)


def _groups(words: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def share_of_other_words(first_BT: jax.Array, second_BT: jax.Array) -> jax.Array:
    """Percentage of the places of either sentence where the other has another word, float32 [B]."""
    there_BT = (first_BT != 0) | (second_BT != 0)
    differs_B = jnp.sum(there_BT & (first_BT != second_BT), axis=1, dtype=jnp.float32)
    return 100 * differs_B / jnp.maximum(jnp.sum(there_BT, axis=1), 1)


SENTENCE = TaskOutput(
    "sentence",
    "word index",
    share_of_other_words,
    "another word stands at more than {} % of the sentence's places",
    levels=(0.0, 5.0, 50.0),
)


def sentences(name: str, written: WrittenWords) -> Task:
    """The task of writing a sentence: how a path that does is scored; nothing is trained on it."""
    shown = {"words": list(written.words), "end": written.end, "marks": written.marks}
    return Task(
        name=name,
        channels=len(written.words),
        loss=cross_entropy,
        metric=Bleu(written),
        headline="bleu_4",
        lower_is_better=False,
        weight=1.0,
        postprocess=said,
        picture=WordKey(nothing),
        label=ROWS,
        output=replace(SENTENCE, shown=shown),
    )
