"""A batch is a function of (seed, step) and of nothing else."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.data.pipeline import host_rows, prefetch, shuffled
from moezoo.data.source import ArraySource, Info
from moezoo.domains.images.data.batches import evaluation
from moezoo.domains.images.data.batches import training as Training
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.errors import UserError


def toy(count: int) -> ArraySource:
    """Examples whose depth tells their index."""
    rng = np.random.default_rng(0)
    info = Info("toy", "train", (8, 8), ("semseg", "depth", "normals"), {}, kinds=KINDS)
    index = np.arange(count, dtype=np.float32)[:, None, None]
    arrays = {
        "image": rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8),
        "semseg": rng.integers(0, 5, (count, 8, 8)).astype(np.uint8),
        "depth": np.broadcast_to(index, (count, 8, 8)).copy(),
        "normals": rng.normal(size=(count, 8, 8, 3)).astype(np.float32),
    }
    return ArraySource(info, arrays)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


AUGMENT = ("flip", "photometric", "zoom")


@given(step=st.integers(0, 10**7), seed=st.integers(0, 2**31 - 1), size=st.integers(1, 9))
def test_a_batch_is_a_function_of_its_step(step: int, seed: int, size: int) -> None:
    first = Training(toy(11), size, seed, augment=AUGMENT)
    second = Training(toy(11), size, seed, augment=AUGMENT)
    second.batch(step + 3)
    assert equal(first.batch(step), second.batch(step))


@given(step=st.integers(0, 1000), processes=st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_hosts_read_shares_of_the_same_batch(step: int, processes: int) -> None:
    training = Training(toy(23), 12, 5, augment=AUGMENT)
    whole = training.batch(step)
    shares = [training.batch(step, host_rows(12, p, processes)) for p in range(processes)]
    joined = {k: np.concatenate([share[k] for share in shares]) for k in whole}
    assert equal(whole, joined)


def test_every_epoch_visits_every_example_once_in_another_order() -> None:
    training = Training(toy(10), 5, 0)
    visits = [training.batch(step)["depth"][:, 0, 0] for step in range(8)]
    epochs = np.concatenate(visits).reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(e) for e in epochs}) == 4


def test_batches_may_cross_epochs_and_exceed_the_source() -> None:
    training = Training(toy(3), 8, 0)
    order = np.concatenate([training.batch(s)["depth"][:, 0, 0] for s in range(3)])
    assert (np.sort(order.reshape(-1, 3), axis=1) == np.arange(3)).all()


def test_seeds_and_rows_vary_independently() -> None:
    one = Training(toy(1), 16, 0, augment=("photometric",)).batch(0)["image"]
    assert len({row.tobytes() for row in one}) == 16
    two = Training(toy(1), 16, 1, augment=("photometric",)).batch(0)["image"]
    assert not np.array_equal(one, two)
    assert not np.array_equal(shuffled(0, 0, 50), shuffled(1, 0, 50))


def test_a_batch_has_what_tasks_read() -> None:
    batch = Training(toy(4), 2, 0, tasks=("depth",)).batch(0)
    assert batch.keys() == {"image", "depth"}
    assert batch["image"].dtype == np.float32 and batch["image"].shape == (2, 8, 8, 3)
    assert abs(batch["image"].mean()) < 1


def test_batches_start_anywhere() -> None:
    training = Training(toy(7), 3, 0, augment=AUGMENT)
    found = list(training.batches(4, 9))
    assert [step for step, _ in found] == [4, 5, 6, 7, 8]
    assert all(equal(batch, training.batch(step)) for step, batch in found)


@given(count=st.integers(1, 20), size=st.integers(1, 8))
def test_evaluation_shows_every_example_once(count: int, size: int) -> None:
    batches = list(evaluation(toy(count), size, tasks=("depth",)))
    assert all(len(b["valid"]) == len(b["image"]) == size for b in batches)
    shown = np.concatenate([b["depth"][b["valid"], 0, 0] for b in batches])
    np.testing.assert_array_equal(shown, np.arange(count))
    assert all(b["valid"].all() for b in batches[:-1])


def test_hosts_share_the_evaluation() -> None:
    whole = list(evaluation(toy(10), 4))
    parts = [list(evaluation(toy(10), 4, rows=host_rows(4, p, 2))) for p in (0, 1)]
    for batch, left, right in zip(whole, *parts, strict=True):
        assert equal(batch, {k: np.concatenate([left[k], right[k]]) for k in batch})


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Training(toy(3), 0, 0)
    with pytest.raises(UserError, match="10 rows cannot be divided among 4"):
        host_rows(10, 0, 4)


def test_prefetch_passes_errors_on_and_stops_when_dropped() -> None:
    def broken():
        yield 1
        raise ValueError("no more")

    items = prefetch(broken(), 2)
    assert next(items) == 1
    with pytest.raises(ValueError, match="no more"):
        next(items)

    def endless():
        while True:
            yield 0

    before = threading.active_count()
    many = prefetch(endless(), 2)
    next(many)
    many.close()
    deadline = time.time() + 5
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_prefetch_stays_within_its_limit() -> None:
    made = []

    def counted():
        for k in range(50):
            made.append(k)
            yield k

    items = prefetch(counted(), 2)
    next(items)
    time.sleep(0.3)
    assert len(made) <= 5
    assert list(items) == list(range(1, 50))
