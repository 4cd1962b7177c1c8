"""Rotary positions against complex numbers, one pair at a time."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moezoo.errors import UserError
from moezoo.nn.rope import RopeConfig, magnitude, rotate, rotation
from tests.backbones import decoder_oracle as oracle

T, H, D = 40, 2, 12
LLAMA3 = RopeConfig(theta=100.0, scaling="llama3", factor=4.0, original_length=32)
ROPES = {
    "none": RopeConfig(),
    "linear": RopeConfig(scaling="linear", factor=3.0),
    "dynamic": RopeConfig(scaling="dynamic", factor=2.0, original_length=10),
    "dynamic_short": RopeConfig(scaling="dynamic", factor=2.0, original_length=50),
    "llama3": LLAMA3,
}
X = np.random.default_rng(0).standard_normal((1, T, H, D)).astype(np.float32)


@pytest.mark.parametrize("name", list(ROPES))
def test_every_pair_turns_by_its_angle(name: str) -> None:
    rope = ROPES[name]
    by = rotation(rope, D, jnp.arange(T)[None])
    found = np.asarray(rotate(jnp.asarray(X), by))
    for t, h in ((0, 0), (1, 1), (7, 0), (T - 1, 1)):
        wanted = oracle.rotated(X[0, t, h].astype(np.float64), t, rope, T)
        np.testing.assert_allclose(found[0, t, h], wanted, rtol=1e-4, atol=1e-5)


def test_llama3_keeps_short_wavelengths_scales_long_ones_and_blends_between() -> None:
    plain = np.array(oracle.frequencies(RopeConfig(theta=100.0), D, T))
    # At position 1 the angle is the frequency.
    by = rotation(LLAMA3, D, jnp.ones((1, 1), jnp.int32))
    share = np.arctan2(by.sin_BTR[0, 0], by.cos_BTR[0, 0]) / plain
    assert share[0] == pytest.approx(1, abs=1e-5) and share[-1] == pytest.approx(0.25, abs=1e-5)
    assert np.all(np.diff(share) <= 1e-6) and np.any((share > 0.3) & (share < 0.95))


def test_yarn_keeps_fast_pairs_scales_slow_ones_and_grows_the_product() -> None:
    rope = RopeConfig(theta=10_000.0, scaling="yarn", factor=4.0, original_length=256, beta_fast=8)
    width = 32
    by = rotation(rope, width, jnp.ones((1, 1), jnp.int32))
    size = 0.1 * math.log(4.0) + 1
    assert magnitude(rope) == size
    np.testing.assert_allclose(np.hypot(by.cos_BTR, by.sin_BTR), size, rtol=1e-6)
    plain = np.array(oracle.frequencies(RopeConfig(), width, T))
    turns = 256 * plain / (2 * math.pi)  # of every pair in a text of the original length
    share = np.arctan2(by.sin_BTR[0, 0], by.cos_BTR[0, 0]) / plain
    np.testing.assert_allclose(share[turns > 16], 1, atol=1e-5)
    np.testing.assert_allclose(share[turns < 0.5], 0.25, atol=1e-4)
    assert np.any((share > 0.3) & (share < 0.95))


def test_a_product_depends_on_the_distance_only() -> None:
    x = jnp.asarray(X[:, :1])

    def product(i: int, j: int) -> np.ndarray:
        q, k = (rotate(x, rotation(RopeConfig(), D, jnp.full((1, 1), p))) for p in (i, j))
        return np.asarray((q * k).sum(-1))

    np.testing.assert_allclose(product(3, 11), product(20, 28), rtol=1e-4)


def test_rotation_in_half_precision_is_computed_in_float32() -> None:
    by = rotation(RopeConfig(), D, jnp.arange(T)[None])
    half = jnp.asarray(X, jnp.bfloat16)
    found = rotate(half, by)
    assert found.dtype == jnp.bfloat16
    wanted = rotate(half.astype(jnp.float32), by).astype(jnp.bfloat16)
    np.testing.assert_array_equal(found.astype(jnp.float32), wanted.astype(jnp.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "llama2"}, "Unknown rope.scaling 'llama2': did you mean llama3"),
        ({"theta": 1.0}, "theta is 1.0; it must be above 1"),
        ({"factor": 0.0}, "factor is 0.0"),
        (
            {"scaling": "llama3", "low_frequency": 4.0},
            "low_frequency is 4.0; it must be below high_frequency, which is 4.0",
        ),
    ],
)
def test_impossible_rotations(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RopeConfig(**changes)
