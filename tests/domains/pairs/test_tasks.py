"""Tasks whose prediction is the most similar candidate, against sums written out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.pairs import tasks as similar
from moezoo.tasks.base import merge


def matching_by_hand(logits, fits, valid, smoothing):
    """Rows and columns one by one."""
    rows = [i for i in range(len(valid)) if valid[i]]
    total = 0.0
    for table, right in ((logits, fits), (logits.T, fits.T)):
        for i in rows:
            shares = np.exp(table[i, rows] - np.log(np.exp(table[i, rows]).sum()))
            good = [j for j in rows if right[i, j]]
            for j, share in zip(rows, shares, strict=True):
                wanted = smoothing / len(rows)
                wanted += (1 - smoothing) / len(good) if j in good else 0.0
                total -= wanted * np.log(share) / len(rows) / 2
    return total


@pytest.mark.slow
@given(st.integers(1, 6), st.integers(0, 3), st.integers(0, 2**31))
def test_matching_loss_is_the_sum_written_out(rows, more, seed):
    rng = np.random.default_rng(seed)
    size = rows + more
    logits = rng.normal(size=(size, size)).astype(np.float32)
    text = rng.integers(0, 2, (size, 2))
    valid = np.arange(size) < rows
    fits = (text[:, None] == text[None]).all(-1)
    loss = similar.matching_loss(
        jnp.asarray(logits), {"text": jnp.asarray(text)}, jnp.asarray(valid), fits=similar.same_text
    )
    np.testing.assert_allclose(loss, matching_by_hand(logits, fits, valid, 0.1), 1e-4, 1e-5)


@pytest.mark.slow
def test_matching_loss_has_gradients_without_the_padding():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    part = {"text": jnp.asarray([[1], [2], [3]])}

    def loss(x):
        valid = jnp.asarray([True, True, False])
        return similar.matching_loss(x, part, valid, fits=similar.same_text)

    gradient = jax.grad(loss)(logits)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[2], 0)
    np.testing.assert_array_equal(gradient[:, 2], 0)
    assert (np.diag(gradient)[:2] < 0).all()


def test_images_fit_texts_that_ask_for_no_more_than_they_have():
    there = jnp.asarray([[1, 1, 0], [1, 0, 0]], bool)
    asked = jnp.asarray([[1, 0, 0], [0, 1, 0]], bool)
    fits = similar.has_all({"there": there, "asked": asked})
    np.testing.assert_array_equal(fits, [[True, True], [True, False]])


def test_recall_counts_both_ways_and_what_chance_gives():
    logits = jnp.asarray([[3.0, 1.0, 9.0], [2.0, 0.0, 9.0], [9.0, 9.0, 9.0]])
    part = {"text": jnp.asarray([[1], [2], [2]])}
    metric = similar.Recall(similar.same_text)
    total = merge(metric.init(), metric.count(logits, part, jnp.asarray([True, True, False])))
    scores = metric.compute(total)
    # Image 0 takes text 0, image 1 too; text 0 takes image 0, text 1 too.
    assert scores == {"recall": 0.5, "image_to_text": 0.5, "text_to_image": 0.5, "chance": 0.5}
    total = merge(total, metric.count(jnp.eye(3), {"text": jnp.asarray([[1], [2], [3]])}))
    assert metric.compute(total)["recall"] == pytest.approx(4 / 5)


def test_words_are_scored_where_they_are_asked_for():
    task = similar.words("mlm", 4)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4)), jnp.float32)
    targets = np.array([[-1, 2, 0], [1, -1, -1]])
    label, valid = {"targets": jnp.asarray(targets)}, jnp.asarray([True, False])
    log = np.asarray(jax.nn.log_softmax(logits, -1))
    wanted = -(log[0, 1, 2] + log[0, 2, 0]) / 2
    np.testing.assert_allclose(task.loss(logits, label, valid), wanted, 1e-5)
    total = merge(task.metric.init(), task.metric.count(logits, label, valid))
    best = log.argmax(-1)
    right = (int(best[0, 1] == 2) + int(best[0, 2] == 0)) / 2
    scores = task.metric.compute(total)
    assert scores["accuracy"] == right
    np.testing.assert_allclose(scores["loss"], wanted, 1e-5)
    np.testing.assert_allclose(task.loss(logits, label), (2 * wanted - log[1, 0, 1]) / 3, rtol=1e-5)


def test_choices_are_classes_of_the_part():
    task = similar.choice("scene", 3, names=("a", "b", "c"))
    logits, label = jnp.asarray([[0.0, 2.0, 1.0], [5.0, 0.0, 0.0]]), {"label": jnp.asarray([1, 2])}
    log = np.asarray(jax.nn.log_softmax(logits, -1))
    np.testing.assert_allclose(task.loss(logits, label), -(log[0, 1] + log[1, 2]) / 2, 1e-6)
    total = merge(task.metric.init(), task.metric.count(logits, label))
    assert task.metric.compute(total)["accuracy"] == 0.5
