"""Sentences: BLEU by hand, states that add up, what agreement means."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.tasks import base
from moezoo.tasks.sentence import Bleu, WrittenWords, said, sentences, share_of_other_words

WORDS = ("<pad>", "<mask>", "<start>", "<end>", "the", "cat", "is", "on", "mat", "a")
WRITTEN = WrittenWords(WORDS, end=3, marks=4)


def rows(*texts: str) -> np.ndarray:
    made = np.zeros((len(texts), 9), np.int32)
    for row, text in zip(made, texts, strict=True):
        ids = [WORDS.index(word) for word in text.split()]
        row[: len(ids) + 1] = [*ids, 3]
    return made


def logits(ids_BT: np.ndarray) -> np.ndarray:
    """One-hot where a sentence is, 0 behind its end."""
    return np.eye(len(WORDS), dtype=np.float32)[ids_BT] * (ids_BT > 0)[..., None]


SAID = rows("the the the the the the the", "the cat is on the mat", "a cat is on mat")
TRUE = rows("the cat is on the mat", "the cat is on the mat", "the cat is on the mat a mat")


def test_bleu_is_that_of_the_paper_by_hand() -> None:
    """Clipped counts (2 of 7 "the"), one penalty for all, sums over sentences."""
    metric = Bleu(WRITTEN)
    state = metric.count(logits(SAID), TRUE)
    assert state["groups"].tolist() == [18, 15, 12, 9]
    assert state["found"].tolist() == [2 + 6 + 5, 0 + 5 + 2, 0 + 4 + 1, 0 + 3 + 0]
    shares = np.array([13 / 18, 7 / 15, 5 / 12, 3 / 9])
    wanted = np.exp(1 - 20 / 18) * np.prod(shares) ** 0.25
    scores = metric.compute(state)
    assert scores["bleu_4"] == pytest.approx(wanted) and scores["right"] == pytest.approx(1 / 3)


def test_states_of_parts_add_up_and_padding_rows_do_not_count() -> None:
    metric = Bleu(WRITTEN)
    whole = metric.count(logits(SAID), TRUE)
    parts = [metric.count(logits(SAID[i : i + 1]), TRUE[i : i + 1]) for i in range(3)]
    summed = metric.init()
    for part in parts:
        summed = base.merge(summed, part)
    assert all(np.array_equal(summed[name], whole[name]) for name in whole)
    first = metric.count(logits(SAID), TRUE, np.array([True, False, False]))
    assert all(np.array_equal(first[name], parts[0][name]) for name in whole)
    assert metric.compute(parts[0])["bleu_4"] == 0.0
    assert np.isnan(metric.compute(metric.init())["bleu_4"])


def test_sentences_differ_by_their_words() -> None:
    first = said(jnp.asarray(logits(SAID)))
    assert np.array_equal(first, SAID)
    apart = share_of_other_words(first, jnp.asarray(TRUE))
    assert apart[1] == 0 and 0 < apart[2] < 100
    task = sentences("caption", WRITTEN)
    assert task.painting() == {"kind": "sentence", "words": list(WORDS), "end": 3, "marks": 4}
    assert 5.0 in task.prediction.levels, "tools ask at this level"
