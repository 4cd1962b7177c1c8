"""Rows of one or several documents: nothing lost, nothing cut, nothing crosses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.text.data.encode import EncodedDocument, answers_only, everything
from moezoo.domains.text.data.packing import Packed, first_fit
from moezoo.domains.text.data.rows import Padded, blank, fill
from tests.domains.text.data.samples import documents_of, slow_row

SIZES = st.lists(st.integers(1, 16), min_size=1, max_size=60)


def slow_first_fit(sizes: list[int], length: int, window: int) -> list[int]:
    """A row is [number, room]; the order of the window is that of opening, replaced in place."""
    rows: list[list[int]] = []
    chosen, opened = [], 0
    for size in sizes:
        fitting = [row for row in rows if row[1] >= size]
        if fitting:
            row = fitting[0]
        else:
            row = [opened, length]
            opened += 1
            if len(rows) < window:
                rows.append(row)
            else:
                fullest = min(range(window), key=lambda i: rows[i][1])
                rows[fullest] = row
        row[1] -= size
        chosen.append(row[0])
    return chosen


@given(sizes=SIZES, length=st.integers(16, 40), window=st.integers(1, 8))
def test_first_fit_is_that_of_the_oracle(sizes: list[int], length: int, window: int) -> None:
    found = first_fit(np.array(sizes), length, window)
    assert found.tolist() == slow_first_fit(sizes, length, window)
    assert np.bincount(found, sizes).max() <= length


@given(
    sizes=SIZES,
    length=st.integers(16, 40),
    seed=st.integers(0, 99),
    epoch=st.integers(0, 5),
    window=st.integers(1, 8),
    trained=st.sampled_from([answers_only, everything]),
)
def test_an_epoch_holds_every_document_once_whole_and_masked(
    sizes: list[int], length: int, seed: int, epoch: int, window: int, trained
) -> None:
    documents = documents_of(sizes)
    packed = Packed(documents, length, seed, "toy", "train", trained, window)
    seen = []
    for index in range(len(packed)):
        members = packed.members(epoch, index).tolist()
        assert members
        seen += members
        expected = slow_row(
            [(documents[i], int(documents.task_N[i])) for i in members],
            length,
            documents.pad,
            trained is answers_only,
        )
        row = packed.epoch(epoch)[index]
        assert row.keys() == expected.keys()
        for name, values in row.items():
            assert values.dtype == np.int32
            np.testing.assert_array_equal(values, expected[name], name)
        # All tokens differ, so a target is its input's successor or it crosses documents.
        learned = row["targets"] >= 0
        np.testing.assert_array_equal(row["targets"][learned], row["tokens"][learned] + 1)
    assert sorted(seen) == list(range(len(sizes)))
    assert packed.density == sum(sizes) / (len(packed) * length)


def test_epochs_deal_anew_and_are_functions_of_seed_and_epoch() -> None:
    rng = np.random.default_rng(1)
    documents = documents_of(rng.integers(1, 20, 300).tolist())

    def all_members(seed: int, epoch: int) -> list[list[int]]:
        packed = Packed(documents, 32, seed, "toy", "train")
        packed.members(epoch + 7, 0)
        return [packed.members(epoch, i).tolist() for i in range(len(packed))]

    assert all_members(0, 3) == all_members(0, 3)
    different = [all_members(0, 0), all_members(0, 1), all_members(1, 0)]
    for a in range(3):
        for b in range(a):
            assert different[a] != different[b]
    partners = [{frozenset(m) for m in members} for members in different[:2]]
    assert len(partners[0] & partners[1]) < len(partners[0]) / 4
    packed = Packed(documents, 32, 0, "toy", "train")
    for name, values in packed[4].items():
        np.testing.assert_array_equal(values, packed.epoch(0)[4][name])
        np.testing.assert_array_equal(values, packed.epoch(1).epoch(0)[4][name])


def test_packing_is_dense() -> None:
    rng = np.random.default_rng(0)
    sizes = np.clip(rng.lognormal(3.2, 0.7, 5000), 2, 256).astype(int)
    packed = Packed(documents_of(sizes.tolist()), 256, 0, "toy", "train")
    assert packed.density > 0.95


@given(sizes=SIZES, trained=st.sampled_from([answers_only, everything]))
def test_padded_rows_hold_one_document(sizes: list[int], trained) -> None:
    documents = documents_of(sizes)
    padded = Padded(documents, 20, "toy", "train", trained)
    assert len(padded) == len(sizes)
    for index in range(len(padded)):
        one = [(documents[index], int(documents.task_N[index]))]
        expected = slow_row(one, 20, documents.pad, trained is answers_only)
        for name, values in padded.epoch(5)[index].items():
            np.testing.assert_array_equal(values, expected[name], name)


def test_a_cut_is_not_learned_from() -> None:
    document = EncodedDocument(np.arange(6, dtype=np.int32), np.array([0, 0, 0, 0, 1, 1], bool), 3)
    row = fill([(document, 2)], 6, 9, everything)
    assert row["targets"].tolist() == [1, 2, -1, 4, 5, -1]
    assert fill([(document, 2)], 6, 9, answers_only)["targets"].tolist() == [-1, -1, -1, 4, 5, -1]


def test_what_a_source_says_of_itself() -> None:
    documents = documents_of([3, 4])
    for source in (Padded(documents, 8, "toy", "test"), Packed(documents, 8, 0, "toy", "test")):
        info = source.info
        assert (info.name, info.split, info.length, info.pad) == ("toy", "test", 8, 7)
        assert info.tasks == documents.tasks and info.vocabulary == documents.vocabulary
        assert source.epoch(1).info == info and len(source.epoch(1)) == len(source)


def test_blank_rows_are_padding() -> None:
    row = blank(3, 9)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [9, 9, 9],
        "targets": [-1, -1, -1],
        "segments": [0, 0, 0],
        "positions": [0, 0, 0],
        "task": [0, 0, 0],
    }


def test_documents_that_do_not_fit_are_refused() -> None:
    documents = documents_of([3, 9])
    for arrange in (
        lambda: Padded(documents, 8, "toy", "train"),
        lambda: Packed(documents, 8, 0, "toy", "train"),
        lambda: first_fit(np.array([3, 9]), 8),
        lambda: fill([(documents[0], 0), (documents[1], 0)], 8, 0, everything),
    ):
        with pytest.raises(ValueError, match="in (a row|rows) of 8"):
            arrange()
    with pytest.raises(IndexError):
        Packed(documents, 9, 0, "toy", "train")[2]
