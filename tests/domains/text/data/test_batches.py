"""A batch of rows is a function of (seed, step) and of nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.data.pipeline import host_rows
from moezoo.domains.text.data.packing import Packed
from moezoo.domains.text.data.rows import Padded, TextTraining, text_evaluation
from moezoo.errors import UserError
from tests.domains.text.data.samples import documents_of


def packed(count: int = 90) -> Packed:
    sizes = np.random.default_rng(0).integers(1, 20, count).tolist()
    return Packed(documents_of(sizes), 32, 0, "toy", "train")


SOURCE = packed()


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**31 - 1), size=st.integers(1, 9))
def test_a_batch_is_a_function_of_its_step(step: int, seed: int, size: int) -> None:
    second = TextTraining(packed(), size, seed)
    second.batch(step + 3)
    batch = TextTraining(SOURCE, size, seed).batch(step)
    assert equal(batch, second.batch(step))
    assert all(v.shape == (size, 32) and v.dtype == np.int32 for v in batch.values())


@given(step=st.integers(0, 1000), processes=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_hosts_read_shares_of_the_same_batch(step: int, processes: int) -> None:
    training = TextTraining(SOURCE, 12, 5)
    shares = [training.batch(step, host_rows(12, p, processes)) for p in range(processes)]
    whole = training.batch(step)
    assert equal(whole, {k: np.concatenate([share[k] for share in shares]) for k in whole})


def test_every_epoch_shows_every_document_once() -> None:
    """Batches of 7 do not divide the rows, so that some cross epochs."""
    training = TextTraining(SOURCE, 7, 1)
    count, documents = len(SOURCE), SOURCE.documents
    batches = [training.batch(step) for step in range(-(-3 * count // 7))]
    rows = {k: np.concatenate([b[k] for b in batches])[: 3 * count] for k in batches[0]}
    firsts = sorted(documents.tokens[documents.starts_N1[:-1]].tolist())
    orders, partners = [], []
    for epoch in range(3):
        part = {k: v[epoch * count : (epoch + 1) * count] for k, v in rows.items()}
        begins = (part["segments"] > 0) & (part["positions"] == 0)
        found = part["tokens"][begins].tolist()
        assert sorted(found) == firsts
        orders.append(tuple(found))
        partners.append(
            {frozenset(t[b].tolist()) for t, b in zip(part["tokens"], begins, strict=True)}
        )
        learned = part["targets"] >= 0
        assert (
            learned.sum()
            == documents.answer.sum() - documents.answer[documents.starts_N1[:-1]].sum()
        )
    assert len(set(orders)) == 3
    assert partners[0] != partners[1] != partners[2] != partners[0]


def test_batches_start_anywhere() -> None:
    training = TextTraining(SOURCE, 3, 0)
    found = list(training.batches(4, 9))
    assert [step for step, _ in found] == [4, 5, 6, 7, 8]
    assert all(equal(batch, training.batch(step)) for step, batch in found)
    with pytest.raises(UserError, match="batch size is 0"):
        TextTraining(SOURCE, 0, 0)


@given(count=st.integers(1, 20), size=st.integers(1, 8))
def test_evaluation_shows_every_row_once(count: int, size: int) -> None:
    documents = documents_of([3] * count)
    source = Padded(documents, 4, "toy", "test")
    batches = list(text_evaluation(source, size))
    assert all(len(b["valid"]) == len(b["tokens"]) == size for b in batches)
    shown = np.concatenate([b["tokens"][b["valid"], 0] for b in batches])
    np.testing.assert_array_equal(shown, documents.tokens[documents.starts_N1[:-1]])
    empty = np.concatenate([b["segments"][~b["valid"]] for b in batches])
    assert not empty.any() and len(empty) < size


def test_hosts_share_the_evaluation() -> None:
    whole = list(text_evaluation(SOURCE, 4))
    parts = [list(text_evaluation(SOURCE, 4, host_rows(4, p, 2))) for p in (0, 1)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert equal(batch, {k: np.concatenate([left[k], right[k]]) for k in batch})
