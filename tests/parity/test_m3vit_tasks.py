"""M3ViT's task losses, evaluators, output forms, learning-rate schedule and Delta_m."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.domains.images.tasks import depth, edge, normals, saliency
from moezoo.domains.images.tasks.iou import IoU, class_map, rows_with_objects
from moezoo.tasks import losses
from moezoo.tasks.delta import NYUD_RESNET50, PASCAL_RESNET18, delta_m
from tests.fixtures import load, under
from tests.parity.test_taskexpert import as_label, nhwc
from tests.tasks.tables import EVERY

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
LOWER = {name: name in ("normals", "depth") for name in EVERY}


def marked_entries(logits: jax.Array, label: jax.Array) -> jax.Array:
    """M3ViT marks missing normals with 255, entry by entry."""
    return normals.l1_per_entry(logits, label, label != 255, floor=normals.TINY)


LOSSES = {
    "semseg": losses.cross_entropy,
    "depth": partial(depth.l1, validity=depth.not_marked(255)),
    "normals": marked_entries,
    "edge_posweight095": edge.loss(0.95),
    "sal_balanced": losses.balanced_binary,
}


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses(name: str) -> None:
    case = under(load("m3vit", "losses"), f"{name}/")
    value, gradient = jax.jit(jax.value_and_grad(LOSSES[name]))(
        jnp.asarray(nhwc(case["out"])), as_label(case["label"])
    )
    np.testing.assert_allclose(value, case["loss"], **CLOSE)
    np.testing.assert_allclose(gradient, nhwc(case["grad_out"]), **CLOSE)


def test_empty_label_sets_count_nothing() -> None:
    arrays = load("m3vit", "losses")
    case = under(arrays, "semseg/")
    logits = jnp.asarray(nhwc(case["out"]))
    nothing = np.full(logits.shape[:3], 255, case["label"].dtype)
    slope = jax.jit(jax.value_and_grad(losses.cross_entropy))
    semseg, _ = slope(logits, as_label(case["label"]))
    parts, gradient = slope(logits, nothing)
    assert int(arrays["nan_guard/raw_human_parts_is_nan"]) == 1
    np.testing.assert_array_equal(parts, arrays["nan_guard/human_parts"])
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))
    total = losses.weighted_total({"semseg": semseg, "parts": parts}, {"semseg": 1.0, "parts": 2.0})
    np.testing.assert_allclose(semseg, arrays["nan_guard/semseg"], **CLOSE)
    np.testing.assert_allclose(total, arrays["nan_guard/total"], **CLOSE)


def class_scores(case: dict[str, np.ndarray], metric: IoU) -> tuple[np.ndarray, float]:
    """Per-class and mean IoU of stored class maps."""
    state = jax.jit(metric.count_classes)(case["pred"], case["gt"])
    return metric.per_class(state), metric.compute(state)["mIoU"]


def test_semseg_evaluator() -> None:
    arrays = load("m3vit", "metrics")
    names = sorted({k.split("/")[0] for k in arrays if k.startswith("semseg_")})
    assert names
    for name in names:
        case = under(arrays, f"{name}/")
        iou, mean = class_scores(case, IoU(len(case["iou"])))
        np.testing.assert_allclose(iou, case["iou"], **CLOSE)
        np.testing.assert_allclose(mean, case["mIoU"], **CLOSE)
        np.testing.assert_allclose(mean, case["mIoU_online"], **CLOSE)


def test_parts_evaluator() -> None:
    case = under(load("m3vit", "metrics"), "human_parts/")
    classes = len(case["iou"])
    iou, mean = class_scores(case, IoU(classes, counted=rows_with_objects))
    np.testing.assert_allclose(iou, case["iou"], **CLOSE)
    np.testing.assert_allclose(mean, case["mIoU"], **CLOSE)
    np.testing.assert_allclose(
        class_scores(case, IoU(classes))[1], case["mIoU_online_noskip"], **CLOSE
    )


def test_saliency_evaluator() -> None:
    case = under(load("m3vit", "metrics"), "sal/")
    metric = saliency.SaliencyScores()
    np.testing.assert_allclose(saliency.PER_IMAGE, case["thresholds"])
    probability = case["pred"].astype(np.float32) / np.float32(255)
    count = jax.jit(metric.count_probability)
    state = {k: np.asarray(v) for k, v in count(probability, case["gt"]).items()}
    images = state["images"]
    np.testing.assert_allclose(state["jaccard"] / images, case["mIoUs"], **CLOSE)
    np.testing.assert_allclose(state["precision"] / images, case["mPrec"], **CLOSE)
    np.testing.assert_allclose(state["recall"] / images, case["mRec"], **CLOSE)
    precision, recall = state["precision"] / images, state["recall"] / images
    f_measure = 2 * precision * recall / (precision + recall + saliency.EPSILON)
    np.testing.assert_allclose(f_measure, case["F"], **CLOSE)
    for row, jaccards in enumerate(case["all_jaccards"]):
        one = count(probability, case["gt"], np.arange(len(probability)) == row)
        np.testing.assert_allclose(one["jaccard"], jaccards, **CLOSE)
    scores = metric.compute(state)
    for key in ("mIoU", "mIoU_online"):
        np.testing.assert_allclose(scores["mIoU"], case[key], **CLOSE)
    for key in ("maxF", "maxF_online"):
        np.testing.assert_allclose(scores["maxF_per_image"], case[key], **CLOSE)


def test_depth_evaluator() -> None:
    case = under(load("m3vit", "metrics"), "depth/")
    predicted, truth = case["pred"][..., None], case["gt_zero_invalid"]
    metric = depth.DepthErrors()
    scores = metric.compute(jax.jit(metric.count)(predicted, truth))
    marked = depth.DepthErrors(depth.not_marked(255))
    online = marked.compute(jax.jit(marked.count)(predicted, np.where(truth == 0, 255, truth)))
    for key in ("rmse", "log_rmse"):
        np.testing.assert_allclose(scores[key], case[key], **CLOSE)
        np.testing.assert_allclose(online[key], case[f"{key}_online_255"], **CLOSE)


def test_normals_evaluator() -> None:
    case = under(load("m3vit", "metrics"), "normals/")
    metric = normals.NormalAngles()
    predicted = 2.0 * case["pred_rgb8"].astype(np.float32) / 255 - 1
    scores = metric.compute(jax.jit(metric.count)(predicted, case["gt"]))
    exact = normals.exact_scores(predicted, case["gt"], np.any(case["gt"] != 0, axis=-1))
    np.testing.assert_allclose(scores["mean_angle"], case["mean"], **CLOSE)
    np.testing.assert_allclose(scores["rmse_angle"], case["rmse"], **CLOSE)
    np.testing.assert_allclose(scores["median_angle"], case["median"], atol=0.1)
    np.testing.assert_allclose(exact[:3], [case["mean"], case["median"], case["rmse"]], **CLOSE)
    for limit, share in zip(normals.LIMITS, exact.within, strict=True):
        np.testing.assert_allclose(100 * share, case[f"{limit:g}"], **CLOSE)
        np.testing.assert_allclose(100 * scores[f"within_{limit:g}"], case[f"{limit:g}"], **CLOSE)
    online = metric.compute(
        jax.jit(metric.count)(case["online_pred_0_255"] / 127.5 - 1, case["gt"])
    )
    # The reference's on-line rmse repeats the mean.
    for key in ("online_mean", "online_rmse"):
        np.testing.assert_allclose(online["mean_angle"], case[key], **CLOSE)
    for limit in normals.LIMITS:
        share = 100 * online[f"within_{limit:g}"]
        np.testing.assert_allclose(share, case[f"online_{limit:g}"], **CLOSE)


def test_edge_training_proxy() -> None:
    case = under(load("m3vit", "metrics"), "edge/")
    chance = np.clip(case["pred_0_255"].astype(np.float64) / 255, 1e-12, 1 - 1e-12)
    logits = np.log(chance / (1 - chance)).astype(np.float32)[..., None]
    metric = edge.TrainingProxy()
    loss = metric.compute(metric.count(logits, case["gt"].astype(np.int32)))["loss"]
    np.testing.assert_allclose(loss, case["meter_loss"], **CLOSE)


def test_delta_m() -> None:
    case = under(load("m3vit", "metrics"), "delta/")
    order = ("semseg", "normals", "parts", "saliency", "edge")
    pascal = dict(zip(order, map(float, case["pascal_in"]), strict=True))
    nyud = dict(zip(("semseg", "depth"), map(float, case["nyud_in"]), strict=True))
    np.testing.assert_allclose(delta_m(pascal, PASCAL_RESNET18, LOWER), case["pascal"], **CLOSE)
    np.testing.assert_allclose(delta_m(nyud, NYUD_RESNET50, LOWER), case["nyud"], **CLOSE)


def test_output_forms() -> None:
    case = under(load("m3vit", "misc"), "post/")
    np.testing.assert_array_equal(class_map(nhwc(case["semseg_in"])), case["semseg_out"])
    vectors = normals.to_bytes_range(nhwc(case["normals_in"]), floor=normals.TINY)
    np.testing.assert_allclose(vectors, case["normals_out"], rtol=1e-4, atol=1e-3)
    chance = saliency.to_bytes_range(nhwc(case["sal_in"]))
    np.testing.assert_allclose(chance, case["sal_out"], **CLOSE)
    metres = depth.metres(nhwc(case["depth_in"]))
    np.testing.assert_array_equal(metres, np.maximum(case["depth_out"][..., 0], 0))


def test_learning_rate() -> None:
    from moezoo.train.optim import poly_schedule

    arrays = load("m3vit", "misc")
    epochs = len(arrays["poly_lr"])
    schedule = poly_schedule(float(arrays["poly_base"]), epochs)
    ours = [float(schedule(epoch)) for epoch in range(epochs)]
    np.testing.assert_allclose(ours, arrays["poly_lr"], rtol=1e-4, atol=1e-9)
