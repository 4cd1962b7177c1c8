"""The shared losses against plain NumPy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.domains.images.tasks import depth, edge, normals
from moezoo.tasks import losses

RNG = np.random.default_rng(3)
SHAPE = (3, 6, 7)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def class_case(classes: int) -> tuple[np.ndarray, np.ndarray]:
    logits = RNG.normal(size=(*SHAPE, classes)).astype(np.float32)
    label = RNG.integers(0, classes, SHAPE)
    return logits, np.where(RNG.random(SHAPE) < 0.3, 255, label).astype(np.uint8)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def test_cross_entropy() -> None:
    logits, label = class_case(5)
    seen = label != 255
    chosen = log_softmax(logits)[seen][np.arange(seen.sum()), label[seen]]
    np.testing.assert_allclose(losses.cross_entropy(logits, label), -chosen.mean(), **CLOSE)


def test_balanced_cross_entropy_swaps_the_shares() -> None:
    logits, label = class_case(2)
    seen = label != 255
    target = label[seen]
    share = np.mean(target == 0)
    weight = np.where(target == 1, share, 1 - share)
    chosen = log_softmax(logits)[seen][np.arange(seen.sum()), target]
    np.testing.assert_allclose(
        losses.balanced_cross_entropy(logits, label), -(weight * chosen).mean(), **CLOSE
    )


@pytest.mark.parametrize("weight", [0.95, 0.5, None])
def test_binary(weight: float | None) -> None:
    logits, label = class_case(2)
    logits, seen = logits[..., :1], label != 255
    target, chance = label[seen], sigmoid(logits[..., 0][seen])
    w = np.mean(target == 0) if weight is None else weight
    expected = -np.where(target == 1, w * np.log(chance), (1 - w) * np.log(1 - chance)).mean()
    loss = losses.balanced_binary if weight is None else edge.loss(weight)
    np.testing.assert_allclose(loss(logits, label), expected, **CLOSE)


def test_balanced_binary_needs_both_kinds() -> None:
    logits, _ = class_case(1)
    for same in (0, 1):
        value, gradient = jax.value_and_grad(losses.balanced_binary)(
            jnp.asarray(logits), np.full(SHAPE, same, np.uint8)
        )
        assert value == 0 and not np.any(gradient)


def test_binary_is_exact_far_from_zero() -> None:
    logits = np.array([80.0, -80.0, 80.0, -80.0], np.float32).reshape(1, 2, 2, 1)
    label = np.array([1, 1, 0, 0], np.uint8).reshape(1, 2, 2)
    np.testing.assert_allclose(edge.loss(0.95)(logits, label), (0.95 + 0.05) * 80 / 4, rtol=1e-6)


def test_depth_ignores_what_was_not_measured() -> None:
    label = np.array([[[2.0, 0.0], [np.inf, 5.0]]], np.float32)
    prediction = np.array([[[3.0, 9.0], [9.0, 4.5]]], np.float32)[..., None]
    value, gradient = jax.value_and_grad(depth.l1)(jnp.asarray(prediction), label)
    np.testing.assert_allclose(value, (1.0 + 0.5) / 2)
    np.testing.assert_allclose(gradient[0, ..., 0], [[0.5, 0.0], [0.0, -0.5]])


def test_normals_forms_differ_by_the_number_of_components() -> None:
    prediction = RNG.normal(size=(*SHAPE, 3)).astype(np.float32)
    label = RNG.normal(size=(*SHAPE, 3)).astype(np.float32)
    label /= np.linalg.norm(label, axis=-1, keepdims=True)
    label[0, :3] = 0
    seen = np.any(label != 0, axis=-1)
    gap = np.abs(prediction / np.linalg.norm(prediction, axis=-1, keepdims=True) - label)[seen]
    np.testing.assert_allclose(normals.loss_m3vit(prediction, label), gap.mean(), **CLOSE)
    np.testing.assert_allclose(
        normals.loss_taskprompter(prediction, label), gap.sum(-1).mean(), **CLOSE
    )


def test_unit_is_bounded_at_the_zero_vector() -> None:
    slope = jax.jit(jax.jacrev(normals.unit))(jnp.zeros(3))
    np.testing.assert_allclose(slope, np.eye(3) / normals.FLOOR, rtol=1e-5)
    np.testing.assert_array_equal(normals.unit(jnp.zeros(3)), np.zeros(3))
    short = jnp.array([0.0, 2e-3, 0.0])
    np.testing.assert_allclose(normals.unit(short), [0, 1, 0], rtol=1e-6)


def test_weighted_total() -> None:
    total = losses.weighted_total({"a": jnp.float32(2), "b": jnp.float32(3)}, {"a": 1, "b": 10})
    assert total == 32


@pytest.mark.slow
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_class_balance_weighs_classes_by_their_share(exponent: float) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    label = rng.choice([0, 0, 0, 0, 1, 1, 255], size=(2, 5, 4)).astype(np.uint8)
    valid = np.array([True, False])
    expected = weight = 0.0
    known = label[0][label[0] != 255]
    for y, x in np.ndindex(5, 4):
        c = label[0, y, x]
        if c != 255:
            w = (known == c).mean() ** -exponent
            row = logits[0, y, x].astype(np.float64)
            expected += w * (np.log(np.exp(row).sum()) - row[c])
            weight += w
    loss = partial(losses.class_balanced_cross_entropy, exponent=exponent)
    assert float(loss(logits, label, valid)) == pytest.approx(expected / weight, rel=1e-5)
    nothing = np.full_like(label, 255)
    value, slope = jax.value_and_grad(loss)(jnp.asarray(logits), nothing)
    assert value == 0 and not np.any(slope)
