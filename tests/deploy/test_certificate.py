"""Every number of a certificate, computed a second time in another way."""

from __future__ import annotations

import dataclasses
from math import comb
from typing import Any

import numpy as np
import pytest

from moezoo.data.source import ArraySource, Info
from moezoo.deploy import certificate, compare, cost, splits
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.export import PhotoExports
from moezoo.errors import UserError
from moezoo.label import LabelKind
from moezoo.train.config import Config
from tests import fixtures
from tests.deploy.conftest import CHANNELS, CLASSES, CONFIG, SIZE, Case, batches
from tests.tasks.tables import AUDIO, IMAGES, build


@pytest.fixture(scope="module")
def labels(case: Case) -> np.ndarray:
    rng = np.random.default_rng(11)
    labels = rng.integers(0, CLASSES, (len(case.images), *SIZE)).astype(np.uint8)
    labels[:, 0] = 255
    return labels


def source(images: np.ndarray) -> ArraySource:
    info = Info("rooms", "test", SIZE, ("semseg",), {}, kinds=KINDS)
    return ArraySource(info, {"image": images})


@pytest.fixture(scope="module")
def part(case: Case) -> splits.Subset:
    return splits.part(exports(), source(case.images), "test", 0, len(case.images))


@pytest.fixture(scope="module")
def found(case: Case, labels: np.ndarray) -> compare.Compared:
    given = batches(case.images, 9, semseg=labels)
    with fixtures.compiled_as_by_default():
        return compare.compare(case.whole, case.cut, case.task, given)


def exports(**data: Any) -> PhotoExports:
    section = DataConfig(**data)
    return PhotoExports(Config("small", CONFIG, ("semseg",), section), section)


def classes(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Class maps of the whole model and of the pruned path."""
    return case.full_logits.argmax(-1), np.asarray(case.prediction.logits).argmax(-1)


def mean_iou(predicted: np.ndarray, labels: np.ndarray) -> float:
    known = labels != 255
    shares = []
    for c in range(CLASSES):
        a, b = (predicted == c) & known, (labels == c) & known
        shares.append((a & b).sum() / max((a | b).sum(), 1))
    return float(np.mean(shares))


def test_verification(case: Case, found: compare.Compared, part: splits.Subset) -> None:
    stated = certificate.verification(found, part, case.cut, case.task)
    n = len(case.images)
    violations = case.prediction.violations_B
    assert stated["images"] == n
    assert stated["coverage"] == pytest.approx(np.mean(violations == 0))
    assert stated["violations_per_image"] == pytest.approx(violations.mean())
    assert stated["clean_but_not_bit_equal"] == 0

    before, after = classes(case)
    share = (before != after).mean((1, 2))
    assert stated["mean_difference"] == pytest.approx(100 * share.mean(), rel=1e-5)
    assert stated["worst_difference"] == pytest.approx(100 * share.max(), rel=1e-5)
    assert [d["level"] for d in stated["disagreement"]] == [1, 5, 10]
    assert stated["disagreement"][0]["events"] > 0
    for found_at in stated["disagreement"]:
        assert f"more than {found_at['level']:g} %" in found_at["event"]
        differs = share > found_at["level"] / 100
        assert found_at["events"] == differs.sum()
        assert found_at["rate"] == pytest.approx(differs.mean())
        p = found_at["rate_at_most"]
        chance = sum(comb(n, v) * p**v * (1 - p) ** (n - v) for v in range(differs.sum() + 1))
        assert chance == pytest.approx(0.05, abs=1e-6)

    routing = case.routing
    kept = total = 0.0
    for name, layer in case.cut.layers.items():
        weights = np.asarray(routing[name].weights_NK, np.float64)
        total += weights.sum()
        kept += weights[np.isin(routing[name].experts_NK, layer.kept)].sum()
        asks = np.isin(routing[name].experts_NK, layer.removed).any(1).reshape(n, -1).any(1)
        assert stated["coverage_by_layer"][name] == pytest.approx(1 - asks.mean())
    assert stated["kept_gate_share"] == pytest.approx(kept / total, rel=1e-5)


def test_scores(
    case: Case, found: compare.Compared, part: splits.Subset, labels: np.ndarray
) -> None:
    changes = certificate.resampled_changes(case.task, found)
    stated = certificate.scores(found, part, case.task, changes)
    before, after = classes(case)
    assert stated["metric"] == "mIoU" and not stated["lower_is_better"]
    assert stated["full"]["mIoU"] == pytest.approx(mean_iou(before, labels), abs=1e-9)
    assert stated["path"]["mIoU"] == pytest.approx(mean_iou(after, labels), abs=1e-9)
    assert stated["change"] == pytest.approx(stated["path"]["mIoU"] - stated["full"]["mIoU"])
    low, high = stated["change_95"]
    assert low <= stated["change"] <= high
    changes = [
        mean_iou(b[None], label[None]) - mean_iou(a[None], label[None])
        for a, b, label in zip(before, after, labels, strict=True)
    ]
    assert stated["worst_image"]["change"] == pytest.approx(min(changes), abs=1e-9)
    assert stated["worst_image"]["example"] == int(np.argmin(changes))
    assert stated["mean_image_change"] == pytest.approx(np.mean(changes), abs=1e-9)
    assert stated["worst_class"]["change"] <= stated["change"] + 1e-9


def test_contents_and_calibration(case: Case, part: splits.Subset) -> None:
    stated = certificate.contents(case.cut)
    assert stated["kind"] == "pruned" and certificate.contents(case.whole)["kind"] == "exact"
    assert stated["plan"]["hash"] == case.plan.digest()
    for name, layer in stated["layers"].items():
        assert tuple(layer["kept"]) == case.plan.kept[name]
        assert layer["decision"] == "token"
    stated = certificate.calibration(case.found, part, case.cut)
    assert stated["tokens"] == len(case.images) * (1 + (SIZE[0] // CONFIG.patch) ** 2)
    for name, usage in case.found.layers.items():
        kept = list(case.plan.kept[name])
        share = usage.gate_E[kept].sum() / usage.gate_E.sum()
        assert stated["kept_gate_share"][name] == pytest.approx(share)
        rare = [e for e in case.plan.removed(name) if usage.count_E[e] < 30]
        assert stated["removed_experts_seen_on_under_30_tokens"].get(name, []) == rare


@pytest.mark.slow
def test_cost(case: Case) -> None:
    stated = cost.of_path(case.cut, CONFIG, SIZE, case.task)
    assert stated["parameters"] == sum(np.asarray(w).size for w in case.cut.weights.values())
    assert stated["bytes"] == sum(np.asarray(w).nbytes for w in case.cut.weights.values())
    d, n, c = CONFIG.width, 17, CONFIG.head_channels
    attention = 4 * d * d * n + 2 * n * n * d
    experts = n * CONFIG.top_k * 2 * d * CONFIG.expert_hidden + n * d * CONFIG.experts
    head = 16 * 9 * d * c + 64 * 9 * c * c + 64 * c * CLASSES
    macs = 3 * CONFIG.patch**2 * d * 16 + CONFIG.depth * (attention + experts) + head
    assert stated["flops_per_example"] == 2 * macs
    everything = cost.flops(CONFIG, SIZE, CHANNELS)
    assert everything is not None and everything > 2 * stated["flops_per_example"]
    for row, batch in zip(stated["latency"], (1, 8), strict=True):
        assert row["batch"] == batch and 0 < row["median_ms"] <= row["p95_ms"]


def test_parts_are_disjoint_and_named_by_content() -> None:
    images = np.arange(20)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    train, test = source(images), source(images)
    parts = splits.divide(exports(), train, test, 6)
    assert [len(p.source) for p in parts] == [6, 10, 10]
    shown = [{int(p.source[i]["image"].max()) for i in range(len(p.source))} for p in parts[1:]]
    assert shown[0].isdisjoint(shown[1]) and len(shown[0] | shown[1]) == 20
    marks = {p.fingerprint for p in parts}
    other = splits.divide(exports(seed=1), train, test, 6)
    assert len(marks | {p.fingerprint for p in other}) == 6
    elsewhere = splits.divide(exports(data_dir="here", archive="there"), train, test, 6)
    assert elsewhere.calibration.fingerprint == parts.calibration.fingerprint
    assert len(splits.divide(exports(), train, test, 99).calibration.source) == 20


def unit(rng: np.random.Generator) -> np.ndarray:
    v = rng.normal(size=(2, 8, 8, 3))
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def test_disagreement_measures() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 3, (2, 2, 8, 8))
    found = build("parts", classes=3).prediction.difference(a, b)
    np.testing.assert_allclose(found, 100 * (a != b).mean((1, 2)), rtol=1e-6)
    p, q = rng.uniform(size=(2, 2, 8, 8))
    found = build("edge").prediction.difference(p, q)
    np.testing.assert_allclose(found, 100 * ((p > 0.5) != (q > 0.5)).mean((1, 2)), rtol=1e-6)
    found = build("depth").prediction.difference(p, q)
    expected = 100 * np.sqrt(((p - q) ** 2).mean((1, 2)) / (p**2).mean((1, 2)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    u, v = unit(rng), unit(rng)
    angles = np.degrees(np.arccos(np.clip((u * v).sum(-1), -1, 1)))
    found = build("normals").prediction.difference(u.astype(np.float32), v.astype(np.float32))
    np.testing.assert_allclose(found, angles.mean((1, 2)), rtol=1e-4)
    for name in (*IMAGES, *AUDIO):
        settings = {"classes": 3} if name in ("semseg", "parts", "scene", *AUDIO) else {}
        assert build(name, **settings).output is not None


def test_tasks_of_ones_own_follow_the_kind_of_label_they_declare() -> None:
    crops = build("semseg", classes=3)
    road, far = build("saliency"), build("depth")
    own = {"crops": crops, "road": road, "far": far, "facing": build("normals")}
    units = {"crops": "class index", "road": "probability", "far": "metres"}
    for name, task in own.items():
        renamed = dataclasses.replace(task, name=name)
        assert renamed.prediction.unit == units.get(name, "unit vector in the camera frame")
        assert renamed.painting() == task.painting()
    flow = LabelKind("vector", unknown=0, enlarged="multiplied", channels=2)
    with pytest.raises(UserError, match="flow declares labels of the form 'vector'"):
        _ = dataclasses.replace(far, name="flow", label=flow, output=None).prediction
    with pytest.raises(UserError, match="no scale from low to high"):
        dataclasses.replace(far, name="far", picture=crops.picture).painting()
