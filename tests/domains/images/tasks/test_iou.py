"""Intersection over union against a confusion matrix."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moezoo.domains.images.tasks.iou import IoU, rows_with_objects


def confusion(predicted: np.ndarray, label: np.ndarray, classes: int) -> np.ndarray:
    seen = label != 255
    pairs = np.stack([label[seen], predicted[seen]])
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, tuple(pairs), 1)
    return matrix


@given(st.integers(0, 1000), st.sampled_from([2, 5]))
def test_counts_are_those_of_the_confusion_matrix(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    predicted = rng.integers(0, classes, (4, 5, 6))
    label = rng.choice([*range(classes), 255], (4, 5, 6))
    state = IoU(classes).count_classes(predicted, label)
    matrix = confusion(predicted, label, classes)
    np.testing.assert_array_equal(state["both"], np.diag(matrix))
    np.testing.assert_array_equal(state["actual"], matrix.sum(1))
    np.testing.assert_array_equal(state["predicted"], matrix.sum(0))


def test_a_class_that_never_appears_counts_zero_or_not_at_all() -> None:
    label = np.array([[[0, 0, 1, 1]]])
    metric = IoU(4)
    scores = metric.compute(metric.count_classes(np.array([[[0, 1, 1, 1]]]), label))
    assert scores["mIoU"] == (1 / 2 + 2 / 3) / 4
    assert scores["mIoU_present"] == (1 / 2 + 2 / 3) / 2
    assert scores["mIoU_foreground"] == (2 / 3) / 3
    assert scores["pixel_accuracy"] == 0.75


def test_a_class_that_is_only_predicted_is_present() -> None:
    metric = IoU(3)
    scores = metric.compute(metric.count_classes(np.array([[[0, 2]]]), np.array([[[0, 0]]])))
    assert scores["mIoU_present"] == 1 / 4


def test_images_without_parts_are_left_out() -> None:
    label = np.array([[[0, 0]], [[255, 0]], [[255, 255]], [[1, 0]]])
    np.testing.assert_array_equal(rows_with_objects(label), [False, False, False, True])
    metric = IoU(2, counted=rows_with_objects)
    state = metric.count_classes(np.ones((4, 1, 2), np.int32), label)
    np.testing.assert_array_equal(state["predicted"], [0, 2])
