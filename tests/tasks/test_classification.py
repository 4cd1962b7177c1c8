"""One class for a whole row: the accuracy, by class too, confusions, the tags of the pictures."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from tests.tasks.tables import build

NAMES = ("bedroom", "living room", "office")
TASK = build("scene", classes=3, names=NAMES)


def test_accuracy_is_the_share_of_images_and_its_mean_over_classes() -> None:
    logits = 5.0 * np.eye(3, dtype=np.float32)[[0, 0, 0, 2, 1, 1]]
    label = np.array([0, 0, 1, 2, 1, 255], np.uint8)
    scores = TASK.metric.compute(TASK.metric.count(jnp.asarray(logits), jnp.asarray(label)))
    assert scores["accuracy"] == pytest.approx(4 / 5)
    assert scores["mean_class_accuracy"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    np.testing.assert_array_equal(TASK.postprocess(logits), [0, 0, 0, 2, 1, 1])


def test_confusions_are_right_classes_by_predicted_ones() -> None:
    event = build("event", classes=3)
    assert event.name == "event" and not event.per_pixel
    logits = 5.0 * np.eye(3, dtype=np.float32)[[0, 0, 2, 2, 1]]
    label = np.array([0, 1, 1, 2, 255], np.uint8)
    found = event.metric.count(jnp.asarray(logits), jnp.asarray(label))["confusion"]
    np.testing.assert_array_equal(found, [[1, 0, 0], [1, 0, 1], [0, 0, 1]])
    valid = jnp.asarray([True, False, True, True, True])
    some = event.metric.count(jnp.asarray(logits), jnp.asarray(label), valid)["confusion"]
    np.testing.assert_array_equal(some, [[1, 0, 0], [0, 0, 1], [0, 0, 1]])


def test_classes_that_do_not_occur_leave_the_mean_alone() -> None:
    logits = 5.0 * np.eye(3, dtype=np.float32)[[0, 1]]
    state = TASK.metric.count(jnp.asarray(logits), jnp.asarray([0, 0], jnp.uint8))
    assert TASK.metric.compute(state)["mean_class_accuracy"] == pytest.approx(0.5)


@pytest.mark.slow
def test_the_loss_is_softmax_cross_entropy() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    label = np.array([2, 0, 255, 1], np.uint8)
    exp = np.exp(logits)
    wanted = -np.log((exp / exp.sum(1, keepdims=True))[[0, 1, 3], [2, 0, 1]]).mean()
    np.testing.assert_allclose(TASK.loss(logits, label), wanted, rtol=1e-5)


def test_every_class_has_a_tag_of_its_own_with_ink_on_it() -> None:
    tags = [TASK.picture(np.asarray(i)) for i in (0, 1, 2, 255)]
    grounds = {tuple(tag[0, 0]) for tag in tags}
    assert len(grounds) == 4 and (0, 0, 0) in grounds
    for tag in tags:
        assert tag.shape == (160, 160, 3) and tag.dtype == np.uint8
        assert 0.01 < np.mean(np.any(tag != tag[0, 0], axis=-1)) < 0.4
    unnamed = build("scene", classes=3)
    assert not np.array_equal(unnamed.picture(np.asarray(1)), tags[1])
