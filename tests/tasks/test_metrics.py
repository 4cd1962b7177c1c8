"""Depth, normals and saliency scores against plain NumPy, and sums that exceed 32 bits."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np
import pytest

from moezoo.domains.images.tasks.depth import DepthErrors
from moezoo.domains.images.tasks.edge import TrainingProxy
from moezoo.domains.images.tasks.iou import IoU
from moezoo.domains.images.tasks.normals import NormalAngles, exact_scores
from moezoo.domains.images.tasks.saliency import BETA_SQUARED, POOLED, SaliencyScores, probability
from moezoo.tasks.base import Metric, State, merge

RNG = np.random.default_rng(5)


@cache
def compiled(metric: Metric):
    return jax.jit(metric.count)


def count(metric: Metric, logits: np.ndarray, label: np.ndarray) -> State:
    """The counts of one batch, compiled once per shape."""
    return compiled(metric)(logits, label)


def test_depth_is_pooled_over_pixels_not_over_images() -> None:
    label = np.zeros((2, 4, 4), np.float32)
    label[0, 0, 0], label[1] = 2.0, 4.0
    prediction = np.full((2, 4, 4, 1), 3.0, np.float32)
    prediction[1] = 4.0
    scores = DepthErrors().compute(count(DepthErrors(), prediction, label))
    assert scores["rmse"] == pytest.approx(np.sqrt(1 / 17), rel=1e-5)
    assert scores["abs_rel"] == pytest.approx(0.5 / 17, rel=1e-5)
    assert scores["within_1.25"] == pytest.approx(16 / 17)


def test_predictions_that_are_not_positive_become_tiny() -> None:
    label = np.full((1, 1, 2), 1.0, np.float32)
    prediction = np.array([-3.0, 0.0], np.float32).reshape(1, 1, 2, 1)
    scores = DepthErrors().compute(count(DepthErrors(), prediction, label))
    assert scores["rmse"] == pytest.approx(1.0)
    assert scores["log_rmse"] == pytest.approx(-np.log(1e-9), rel=1e-5)


def test_normals_against_exact_angles() -> None:
    label = RNG.normal(size=(3, 10, 11, 3)).astype(np.float32)
    prediction = (label + RNG.normal(size=label.shape)).astype(np.float32)
    label[0, :5] = 0
    mask = np.any(label != 0, axis=-1)
    scores = NormalAngles().compute(count(NormalAngles(), prediction, label))
    dot = (prediction * label).sum(-1)[mask].astype(np.float64)
    length = np.linalg.norm(prediction, axis=-1) * np.linalg.norm(label, axis=-1)
    degrees = np.degrees(np.arccos(dot / length[mask]))
    exact = exact_scores(prediction, label, mask)
    for value in (scores["mean_angle"], exact.mean):
        assert value == pytest.approx(degrees.mean(), rel=1e-4)
    assert scores["rmse_angle"] == pytest.approx(np.sqrt((degrees**2).mean()), rel=1e-4)
    assert scores["median_angle"] == pytest.approx(np.median(degrees), abs=0.1)
    assert exact.median == pytest.approx(np.median(degrees), rel=1e-4)
    assert scores["within_30"] == pytest.approx(np.mean(degrees < 30))


@pytest.mark.parametrize("degrees", [[10.0, 40.0], [10.0, 20.0, 80.0], [10.0, 20.0, 60.0, 80.0]])
def test_the_median_of_few_angles_far_apart(degrees: list[float]) -> None:
    turn = np.radians(np.asarray(degrees, np.float32)).reshape(1, 1, -1)
    prediction = np.stack([np.sin(turn), np.zeros_like(turn), np.cos(turn)], axis=-1)
    label = np.broadcast_to(np.array([0, 0, 1], np.float32), prediction.shape)
    scores = NormalAngles().compute(NormalAngles().count(prediction, label))
    assert scores["median_angle"] == pytest.approx(np.median(degrees), abs=0.1)


def test_opposite_and_missing_predictions() -> None:
    label = np.zeros((1, 1, 3, 3), np.float32)
    label[..., 2] = 1.0
    prediction = np.array([[0, 0, -2.0], [0, 0, 0], [0, 0, 1e-6]], np.float32).reshape(label.shape)
    state = count(NormalAngles(), prediction, label)
    assert state["sum"] == pytest.approx(180 + 90 + 0, abs=1e-3)
    assert state["histogram"].sum() == 3 and state["histogram"][-1] == 1


def f_measures(chance: np.ndarray, truth: np.ndarray) -> list[float]:
    values = []
    for limit in POOLED:
        above = chance >= limit
        precision = (above & truth).sum() / max(above.sum(), 1)
        recall = (above & truth).sum() / truth.sum()
        below = BETA_SQUARED * precision + recall
        values.append((1 + BETA_SQUARED) * precision * recall / below if below else 0.0)
    return values


@pytest.mark.parametrize("channels", [1, 2])
def test_saliency_against_loops(channels: int) -> None:
    logits = (2 * RNG.normal(size=(3, 8, 9, channels))).astype(np.float32)
    label = (RNG.random((3, 8, 9)) < 0.4).astype(np.uint8)
    label[1, :3] = 255
    seen, chance = label != 255, np.asarray(probability(logits))
    scores = SaliencyScores().compute(count(SaliencyScores(), logits, label))
    truth = label[seen] == 1
    assert scores["maxF"] == pytest.approx(max(f_measures(chance[seen], truth)), rel=1e-5)
    again = 1 / (1 + np.exp(-chance[seen]))
    assert scores["maxF_double_sigmoid"] == pytest.approx(max(f_measures(again, truth)), rel=1e-5)


@pytest.mark.parametrize("byte", [51, 102, 153, 204])
def test_a_probability_of_a_byte_at_a_threshold_is_above_it(byte: int) -> None:
    """As float32 these are a little above 0.2, 0.4, 0.6 and 0.8 as float64."""
    chance = np.full((1, 1, 2), byte, np.float32) / np.float32(255)
    state = SaliencyScores().count_probability(chance, np.ones((1, 1, 2), np.uint8))
    np.testing.assert_array_equal(state["jaccard"], chance[0, 0, 0] > np.linspace(0.2, 0.9, 15))
    assert chance[0, 0, 0] in np.linspace(0.2, 0.9, 15).astype(np.float32)


def test_one_and_two_logits_mean_the_same() -> None:
    single = RNG.normal(size=(2, 3, 4, 1)).astype(np.float32)
    double = np.concatenate([np.zeros_like(single), single], axis=-1)
    np.testing.assert_allclose(probability(single), probability(double), rtol=1e-6)


def test_an_empty_image_counts_as_found_when_nothing_is_predicted() -> None:
    label = np.zeros((2, 4, 4), np.uint8)
    state = count(SaliencyScores(), np.full((2, 4, 4, 1), -20, np.float32), label)
    assert SaliencyScores().compute(state)["mIoU"] == 1.0
    assert np.isnan(SaliencyScores().compute(state)["maxF"])


def test_the_edges_training_number_counts_labelled_pixels_not_batches() -> None:
    """However images share batches, and whatever is unlabelled or no row at all, it is the same."""
    metric = TrainingProxy()
    logits = RNG.normal(size=(3, 4, 5, 1)).astype(np.float32)
    label = RNG.integers(0, 2, (3, 4, 5)).astype(np.uint8)
    label[0, :3], label[1] = 255, 255
    chance = 1 / (1 + np.exp(-logits[..., 0].astype(np.float64)))
    each = np.where(label == 1, 0.95 * np.log1p(np.exp(-chance)), 0.05 * np.log1p(np.exp(chance)))
    wanted = each[label != 255].mean()
    splits = ([slice(0, 3)], [slice(0, 1), slice(1, 3)], [slice(i, i + 1) for i in range(3)])
    for rows in splits:
        state = metric.init()
        for row in rows:
            state = merge(state, metric.count(logits[row], label[row]))
        assert metric.compute(state)["loss"] == pytest.approx(wanted, rel=1e-5)
    twice = np.concatenate([logits, logits]), np.concatenate([label, 1 - label])
    padded = metric.count(*twice, valid_B=np.arange(6) < 3)
    assert metric.compute(merge(metric.init(), padded))["loss"] == pytest.approx(wanted, rel=1e-5)
    assert np.isnan(metric.compute(metric.init())["loss"])


def test_totals_exceed_32_bits() -> None:
    metric = IoU(2)
    part = {k: np.full(2, 2**31 - 1, np.int32) for k in metric.init()}
    total = metric.init()
    for _ in range(3):
        total = merge(total, part)
    assert total["both"].tolist() == [3 * (2**31 - 1)] * 2
