"""Losses, meters and the boundary benchmark of TaskPrompter and InvPT, number by number."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.domains.images import thinning
from moezoo.domains.images.tasks import depth, edge, normals, saliency
from moezoo.domains.images.tasks.depth import DepthErrors
from moezoo.domains.images.tasks.edges import boundaries, odsf, response
from moezoo.domains.images.tasks.iou import IoU, class_map
from moezoo.tasks import losses
from moezoo.tasks.base import Metric, merge
from tests.fixtures import load, under
from tests.tasks.tables import build

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
NAMES = {"human_parts": "parts", "sal": "saliency"}


def nhwc(array: np.ndarray) -> np.ndarray:
    """Channels last."""
    return np.moveaxis(array, -3, -1)


def unit_pixels(loss, logits: jax.Array, label: jax.Array) -> jax.Array:
    """A normals loss on labels whose missing pixels hold 255 in any component."""
    return loss(logits, label, jnp.all(label != 255, axis=-1), floor=normals.TINY)


def everywhere(label: jax.Array) -> jax.Array:
    """No pixel is invalid."""
    return jnp.ones(label.shape, bool)


def loss_of(name: str):
    """The project's loss for one of the fixture's single losses."""
    if name.startswith("bce_edge_pos_weight_"):
        return partial(losses.fixed_binary, positive_weight=float(name.rsplit("_", 1)[1]))
    if name == "ce_balanced_sal":
        return losses.balanced_cross_entropy
    if name.startswith("ce_"):
        return losses.cross_entropy
    return {
        "bce_edge_hed_style_none": losses.balanced_binary,
        "bce_edge_hed_style_no_positive": losses.balanced_binary,
        "l1_normals": partial(unit_pixels, normals.l1_per_pixel),
        "l1_depth_ignore_minus1": partial(depth.l1, validity=depth.not_marked(-1)),
        "l1_depth_ignore_255": partial(depth.l1, validity=depth.not_marked(255)),
        "l1_depth_no_ignore": partial(depth.l1, validity=everywhere),
    }[name]


def loss_of_task(name: str, depth_mark: float):
    """The project's loss for a task of the benchmarks' totals."""
    return {
        "semseg": losses.cross_entropy,
        "human_parts": losses.cross_entropy,
        "sal": losses.balanced_cross_entropy,
        "normals": partial(unit_pixels, normals.l1_per_pixel),
        "edge": edge.loss(0.95),
        "depth": partial(depth.l1, validity=depth.not_marked(depth_mark)),
    }[name]


def as_label(array: np.ndarray) -> np.ndarray:
    """[B,H,W] for one channel, [B,H,W,3] for vectors."""
    return array[:, 0] if array.shape[1] == 1 else nhwc(array)


@pytest.mark.parametrize("name", ["losses_taskprompter", "losses_invpt"])
def test_single_losses(name: str) -> None:
    arrays = load("taskexpert", name)
    singles = sorted(k.removesuffix("/value") for k in arrays if k.endswith("/value"))
    assert singles
    for single in singles:
        case = under(arrays, f"{single}/")
        value, gradient = jax.jit(jax.value_and_grad(loss_of(single)))(
            jnp.asarray(nhwc(case["logits"])), as_label(case["label"])
        )
        np.testing.assert_allclose(value, case["value"], **CLOSE, err_msg=single)
        np.testing.assert_allclose(gradient, nhwc(case["grad"]), **CLOSE, err_msg=single)


@pytest.mark.parametrize(
    ("name", "depth_mark"), [("losses_taskprompter", -1.0), ("losses_invpt", 255.0)]
)
def test_totals(name: str, depth_mark: float) -> None:
    arrays = load("taskexpert", name)
    totals = sorted(k.split("/")[0] for k in arrays if k.endswith("loss/total"))
    assert totals
    for total in totals:
        case = under(arrays, f"{total}/")
        values, weights = {}, {}
        for kind, prefix in (("logits/", ""), ("inter_logits/", "inter_")):
            for task, logits in under(case, kind).items():
                label = as_label(case[f"label/{task}"])
                loss = jax.jit(loss_of_task(task, depth_mark))
                values[prefix + task] = loss(nhwc(logits), label)
                weights[prefix + task] = weight_of(task)
        for task, value in values.items():
            np.testing.assert_allclose(value, case[f"loss/{task}"], **CLOSE, err_msg=task)
        together = losses.weighted_total(values, weights)
        np.testing.assert_allclose(together, case["loss/total"], **CLOSE)


def weight_of(task: str) -> float:
    """The default weight of the project's task."""
    settings = {"classes": 2} if task == "semseg" else {}
    return build(NAMES.get(task, task), **settings).weight


def total_state(metric: Metric, logits: np.ndarray, label: np.ndarray, count=None) -> dict:
    """All batches of a fixture through a metric."""
    step = jax.jit(count or metric.count)
    state = metric.init()
    for batch_logits, batch_label in zip(logits, label, strict=True):
        state = merge(state, step(batch_logits, batch_label))
    return state


CLASS_TASKS = ("semseg_PASCALContext", "semseg_NYUD", "human_parts")


def test_class_meters() -> None:
    arrays, other = load("taskexpert", "metrics_taskprompter"), load("taskexpert", "metrics_invpt")
    for name in CLASS_TASKS:
        case = under(arrays, f"{name}/")
        logits, label = nhwc(case["logits"]), case["gt"][:, :, 0].astype(np.int32)
        np.testing.assert_array_equal(class_map(logits), case["post"])
        metric = IoU(logits.shape[-1])
        state = total_state(metric, logits, label)
        np.testing.assert_array_equal(state["both"], case["tp"])
        np.testing.assert_array_equal(state["predicted"] - state["both"], case["fp"])
        np.testing.assert_array_equal(state["actual"] - state["both"], case["fn"])
        score = metric.compute(state)["mIoU"]
        np.testing.assert_allclose(100 * score, case["score/mIoU"], **CLOSE)
        np.testing.assert_allclose(score, other[f"{name}/score/mIoU"], **CLOSE)


def test_normals_meter() -> None:
    arrays, other = load("taskexpert", "metrics_taskprompter"), load("taskexpert", "metrics_invpt")
    case = under(arrays, "normals/")
    logits, label = nhwc(case["logits"]), nhwc(case["gt"])
    post = normals.to_bytes_range(logits, floor=normals.TINY)
    np.testing.assert_allclose(post, case["post"], rtol=1e-4, atol=1e-3)
    metric = normals.NormalAngles()

    def count(batch_logits, batch_label):
        return metric.count_masked(batch_logits, batch_label, jnp.all(batch_label != 255, -1))

    state = total_state(metric, logits, label, count)
    np.testing.assert_array_equal(state["histogram"].sum(), case["total"])
    np.testing.assert_allclose(state["sum"], case["sum_deg_diff"], **CLOSE)
    mean = metric.compute(state)["mean_angle"]
    np.testing.assert_allclose(mean, case["score/mean"], **CLOSE)
    np.testing.assert_allclose(mean, other["normals/score/mean"], **CLOSE)


def test_saliency_meter() -> None:
    arrays, other = load("taskexpert", "metrics_taskprompter"), load("taskexpert", "metrics_invpt")
    case = under(arrays, "sal/")
    logits, label = nhwc(case["logits"]), case["gt"][:, :, 0].astype(np.int32)
    np.testing.assert_allclose(saliency.to_bytes_range(logits[0]), case["post"][0], **CLOSE)
    np.testing.assert_allclose(saliency.POOLED, case["thresholds"], rtol=1e-6)
    metric = saliency.SaliencyScores()
    state = total_state(metric, logits, label)
    np.testing.assert_array_equal(state["hits_twice"], case["true_positives"])
    np.testing.assert_array_equal(state["predicted_twice"], case["predicted_positives"])
    np.testing.assert_array_equal(
        np.broadcast_to(state["actual"], case["actual_positives"].shape), case["actual_positives"]
    )
    scores = metric.compute(state)
    for ours, theirs in (
        ("maxF_double_sigmoid", "maxF"),
        ("maxF", "maxF_without_second_sigmoid"),
    ):
        np.testing.assert_allclose(100 * scores[ours], case[f"score/{theirs}"], **CLOSE)
        np.testing.assert_allclose(scores[ours], other[f"sal/score/{theirs}"], **CLOSE)


@pytest.mark.parametrize(
    ("name", "validity"),
    [
        ("metrics_taskprompter", depth.within_80_metres),
        ("metrics_invpt", depth.not_marked(255)),
    ],
)
def test_depth_meter(name: str, validity) -> None:
    case = under(load("taskexpert", name), "depth/")
    logits, label = nhwc(case["logits"]), case["gt"][:, :, 0]
    np.testing.assert_allclose(depth.metres(logits), case["post"][..., 0], **CLOSE)
    metric = DepthErrors(validity)
    state = total_state(metric, logits, label)
    np.testing.assert_array_equal(state["pixels"], case["n_valid"])
    np.testing.assert_allclose(state["squared"], case["total_rmses"], **CLOSE)
    scores = metric.compute(state)
    for score in ("rmse", "log_rmse", "abs_rel", "sq_rel"):
        np.testing.assert_allclose(scores[score], case[f"score/{score}"], **CLOSE, err_msg=score)


def test_edge_training_proxy() -> None:
    arrays, other = load("taskexpert", "metrics_taskprompter"), load("taskexpert", "metrics_invpt")
    case = under(arrays, "edge_reference_loss/")
    logits, label = nhwc(case["logits"]), case["gt"][:, :, 0].astype(np.int32)
    for batch, post, png in zip(logits, case["post"], case["png_uint8"], strict=True):
        bytes_range = np.asarray(edge.to_bytes_range(batch))
        np.testing.assert_allclose(bytes_range, post, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(np.floor(bytes_range), png)
    metric = edge.TrainingProxy()
    loss = metric.compute(total_state(metric, logits, label))["loss"]
    np.testing.assert_allclose(loss, case["score/loss"], **CLOSE)
    np.testing.assert_allclose(loss, other["edge_reference_loss/score/loss"], **CLOSE)


PROTOCOLS = {"pascal": "pascal_regions", "nyud": "nyud"}


def bits(packed: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A packed binary image."""
    return np.unpackbits(packed)[: shape[0] * shape[1]].reshape(shape).astype(bool)


def stored_label(name: str, one: dict[str, np.ndarray]) -> np.ndarray:
    """Region numbers as they are; an edge picture's 255 is an edge, which our labels call 1."""
    return one["gt_input"] if name == "pascal" else (one["gt_input"] > 0).astype(np.uint8)


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_boundary_benchmark(name: str) -> None:
    arrays = load("taskexpert", "edges_seism")
    case = under(arrays, f"{name}/")
    protocol = odsf.PROTOCOLS[PROTOCOLS[name]]
    np.testing.assert_allclose(protocol.thresholds, arrays["thresholds"])
    metric, state = edge.BoundaryF(protocol), edge.BoundaryF(protocol).init()
    images = sorted(int(k.split("/")[0]) for k in case if k.endswith("/pred_png"))
    assert images
    for image in images:
        one = under(case, f"{image}/")
        label = stored_label(name, one)
        truth = protocol.truth(label)
        np.testing.assert_array_equal(truth, bits(one["gt_boundary_thinned"], truth.shape))
        part = metric.count_bytes(one["pred_png"][None], label[None])
        matched, actual, _, predicted = case["counts_cntR_sumR_cntP_sumP"][image].T
        np.testing.assert_array_equal(part["predicted"], predicted)
        np.testing.assert_array_equal(part["actual"], actual)
        np.testing.assert_array_equal(part["matched"], case["max_cardinality_counts"][image])
        # The reference's matcher is random and not always maximal.
        assert (part["matched"] >= matched - 1).all()
        state = merge(state, part)
    np.testing.assert_allclose(
        metric.compute(state)["odsF"], case["odsF_max_cardinality"], rtol=1e-9
    )


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_boundary_scores_from_the_reference_counts(name: str) -> None:
    case = under(load("taskexpert", "edges_seism"), f"{name}/")
    metric = edge.BoundaryF(odsf.PROTOCOLS[PROTOCOLS[name]])
    state = metric.init()
    for matched, actual, _, predicted in np.moveaxis(case["counts_cntR_sumR_cntP_sumP"], 2, 1):
        counts = odsf.Counts(matched, predicted, actual)
        state = merge(state, counts._asdict() | metric.at_best(counts))
    scores = metric.compute(state)
    np.testing.assert_allclose(scores["odsF"], case["odsF"], rtol=1e-9)
    np.testing.assert_allclose(scores["oisF"], case["oisF"], rtol=1e-9)
    np.testing.assert_allclose(scores["threshold"], case["ods_threshold"])
    f = odsf.f_measure(state["matched"], state["predicted"], state["actual"])
    np.testing.assert_allclose(f, case["F_per_threshold"], rtol=1e-9, atol=1e-12)


def test_boundary_responses_are_exact() -> None:
    arrays = load("taskexpert", "edges_seism")
    case = under(arrays, "pascal/0/")
    image = case["pred_png"].astype(np.float32) / np.float32(255)
    blurred, direction = response.triangle_blur(image), response.orientation(image)
    np.testing.assert_allclose(blurred[::9, ::9], case["convTri4"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(direction[::9, ::9], case["orientation"], rtol=1e-6, atol=1e-6)
    thin_response = response.thin_responses(image, fade=5)
    np.testing.assert_array_equal(thin_response > 0, bits(case["nms_nonzero"], image.shape))
    np.testing.assert_allclose(thin_response.sum(dtype=np.float64), case["nms_sum"], rtol=1e-6)
    half = thinning.thin(thin_response > 0.5)
    np.testing.assert_array_equal(half, bits(case["thinned_at_0.5"], image.shape))
    assert boundaries.from_regions(case["gt_input"]).any()
