"""Resizing: sampling points, weights, derivative."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moezoo.ops.interpolate import (
    bicubic,
    bilinear,
    double,
    matrix,
    resize,
    resize_position_embedding,
)


def sampled(row: np.ndarray, target: int, weights) -> np.ndarray:
    """One axis, pixel by pixel from the definition."""
    n = len(row)
    out = np.zeros(target)
    for i in range(target):
        position = (i + 0.5) * n / target - 0.5
        first = int(np.floor(position))
        for tap in range(-1, 3):
            j = min(max(first + tap, 0), n - 1)
            out[i] += weights(abs(position - first - tap)) * row[j]
    return out


def triangle(distance: float) -> float:
    return max(1.0 - distance, 0.0)


def cubic(distance: float, a: float = -0.75) -> float:
    if distance <= 1:
        return (a + 2) * distance**3 - (a + 3) * distance**2 + 1
    return a * distance**3 - 5 * a * distance**2 + 8 * a * distance - 4 * a if distance < 2 else 0.0


@given(st.integers(1, 9), st.integers(1, 12))
def test_matrix_samples_half_pixel_centres_with_clamped_edges(source, target):
    row = np.random.default_rng(source * 100 + target).normal(size=source)
    for kernel, weights in ((bilinear, triangle), (bicubic, cubic)):
        np.testing.assert_allclose(
            matrix(source, target, kernel) @ row, sampled(row, target, weights), atol=1e-5
        )
        np.testing.assert_allclose(matrix(source, target, kernel).sum(1), 1.0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3), (2, 1), (4, 5)])
def test_doubling_equals_the_matrix_product_in_value_and_gradient(height, width):
    x = jax.random.normal(jax.random.key(height * 10 + width), (2, height, width, 3))
    rows, columns = matrix(height, 2 * height), matrix(width, 2 * width)

    def product(x):
        return jnp.einsum("th,sw,bhwc->btsc", rows, columns, x)

    def value_and_gradient(resized):
        y, pull = jax.vjp(resized, x)
        return y, pull(jax.random.normal(jax.random.key(1), y.shape))[0]

    mine, wanted = jax.jit(lambda: [value_and_gradient(f) for f in (double, product)])()
    np.testing.assert_allclose(mine[0], wanted[0], atol=1e-5)
    np.testing.assert_allclose(mine[1], wanted[1], atol=1e-5)


@pytest.mark.parametrize("size", [(6, 8), (3, 4), (5, 9), (1, 1)])
def test_resize_keeps_type_and_constants(size):
    image = jnp.full((2, 3, 4, 1), 1.5, jnp.bfloat16)
    for kernel in (bilinear, bicubic):
        out = resize(image, size, kernel)
        assert out.shape == (2, *size, 1) and out.dtype == jnp.bfloat16
        np.testing.assert_allclose(out.astype(np.float32), 1.5, rtol=1e-2)


def test_resize_to_the_same_size_is_the_input():
    image = jnp.arange(12.0).reshape(1, 3, 4, 1)
    assert resize(image, (3, 4)) is image


def test_position_embedding_keeps_the_first_token_and_drops_a_second_one():
    source = jax.random.normal(jax.random.key(0), (1, 2 + 9, 4))
    out = resize_position_embedding(source, (3, 3))
    assert out.shape == (1, 10, 4)
    np.testing.assert_array_equal(out[:, 0], source[:, 0])
    np.testing.assert_array_equal(out[:, 1:], source[:, 2:])
