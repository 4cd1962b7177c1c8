"""Resizing of images and position embeddings, with the sampling points of PyTorch's `interpolate`.

Centres of pixels correspond (`align_corners=False`) unless other `points` are given, samples beyond
the edge repeat the edge, and nothing is low-pass filtered before shrinking: pretrained weights and
published heads expect this.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from moezoo.errors import UserError

Kernel = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def bilinear(fraction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [taps] and weights [n, taps] of linear interpolation at `fraction` in [0, 1)."""
    return np.array([0, 1]), np.stack([1 - fraction, fraction], axis=1)


def bicubic(fraction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `bilinear`, the cubic convolution kernel with A = -0.75 (Keys, 1981)."""
    a = -0.75  # PyTorch's; Pillow and `jax.image` take -0.5

    def near(t: np.ndarray) -> np.ndarray:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: np.ndarray) -> np.ndarray:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    f = fraction
    return np.array([-1, 0, 1, 2]), np.stack([far(1 + f), near(f), near(1 - f), far(2 - f)], axis=1)


SamplePoints = Callable[[int, int], np.ndarray]  # (source, target) -> where to sample, [target]


def centres(source: int, target: int) -> np.ndarray:
    """Centres of pixels correspond: PyTorch's `align_corners=False`."""
    return (np.arange(target) + 0.5) * source / target - 0.5


def corners(source: int, target: int) -> np.ndarray:
    """First and last pixels correspond: `scipy.ndimage.zoom`, as big_vision and V-MoE use it."""
    return np.linspace(0.0, source - 1.0, target)


def matrix(
    source: int, target: int, kernel: Kernel = bilinear, points: SamplePoints = centres
) -> np.ndarray:
    """float32 [target, source] that resamples one axis."""
    position = points(source, target)
    if kernel is bilinear:
        # As PyTorch, for this kernel only: cubic taps keep their weights at the edge.
        position = np.maximum(position, 0.0)
    first = np.floor(position)
    offsets, weights = kernel(position - first)
    column = np.clip(first[:, None].astype(int) + offsets, 0, source - 1)
    result = np.zeros((target, source))
    # At an edge several taps fall on one pixel: they add up, which an assignment would not.
    np.add.at(result, (np.arange(target)[:, None], column), weights)
    return result.astype(np.float32)


def resize(
    image_BHWC: Array,
    size: tuple[int, int],
    kernel: Kernel = bilinear,
    points: SamplePoints = centres,
) -> Array:
    """Resample to `size` = (height, width); the type of the input is kept.

    Each axis is one small matrix product; doubling, which decoders do all the time, takes slices.
    """
    height, width = image_BHWC.shape[1:3]
    if (height, width) == size:
        return image_BHWC
    if kernel is bilinear and points is centres and (2 * height, 2 * width) == size:
        return double(image_BHWC)
    rows, columns = (
        matrix(n, m, kernel, points) for n, m in zip((height, width), size, strict=True)
    )
    # In float32 between the two products as well, or the image would be rounded twice.
    tall = jnp.einsum("th,bhwc->btwc", rows, image_BHWC.astype(jnp.float32))
    return jnp.einsum("tw,bhwc->bhtc", columns, tall).astype(image_BHWC.dtype)


def double(image_BHWC: Array) -> Array:
    """Bilinear resize to twice the height and width.

    Every new pixel lies a quarter of the way to a neighbour. Weighted shifts equal the matrix
    product and take a third of its time on CPU, forwards and backwards.
    """
    return _double_axis(_double_axis(image_BHWC, 1), 2)


def _double_axis(x: Array, axis: int) -> Array:
    n = x.shape[axis]
    quarter = np.full((2, n), 0.25, np.float32)
    quarter[0, 0] = quarter[1, -1] = 0.0  # beyond the edge the edge itself is repeated
    before, after = (
        jnp.asarray(w.reshape([n if a == axis else 1 for a in range(x.ndim)]), x.dtype)
        for w in quarter
    )
    # A product with a power of two is exact, so fused and unfused programs agree bit for bit.
    first = x + before * (_shifted(x, axis, 1) - x)
    second = x + after * (_shifted(x, axis, -1) - x)
    pairs = jnp.stack([first, second], axis + 1)
    return pairs.reshape(*x.shape[:axis], 2 * n, *x.shape[axis + 1 :])


def _shifted(x: Array, axis: int, step: int) -> Array:
    """Entry i - `step`, 0 beyond the end. One pad: its derivative is one pad, too."""
    widths = [(step, -step, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)]
    return lax.pad(x, jnp.zeros((), x.dtype), widths)


def resize_position_embedding(
    embedding_1TD: Array, grid: tuple[int, int], kernel: Kernel = bilinear
) -> Array:
    """Learned positions of a square pre-training grid for another grid, [1, 1 + h*w, D].

    The last g*g entries, g = floor(sqrt(T)), are the grid; the first entry is kept for the class
    token and further special tokens (distilled models) are left out.
    """
    side = math.isqrt(embedding_1TD.shape[1])
    grid_1PD = embedding_1TD[:, embedding_1TD.shape[1] - side * side :]
    image = grid_1PD.reshape(1, side, side, -1)
    patches = resize(image, grid, kernel).reshape(1, grid[0] * grid[1], -1)
    return jnp.concatenate([embedding_1TD[:, :1], patches], axis=1)


def zoom_position_embedding(source_1TD: Array, target_1TD: Array) -> Array:
    """Learned positions of one square grid in the form of `target_1TD`, those of another.

    Corners correspond and the interpolation is linear, as when V-MoE fine-tunes at another
    resolution. T is a square, or one more with a class token in front, whose position stays as it
    is, or as the target has it where the source has none. Raises UserError for other forms.
    """
    (old, first), (new, wanted) = (_square(a) for a in (source_1TD, target_1TD))
    image = source_1TD[:, first:].reshape(1, old, old, -1)
    patches = resize(image, (new, new), points=corners).reshape(1, new * new, -1)
    # A class token is no place: nothing interpolates it.
    token = (source_1TD if first else target_1TD)[:, :wanted]
    return jnp.concatenate([token, patches], axis=1)


def _square(embedding_1TD: Array) -> tuple[int, int]:
    """Side of the grid and number of tokens in front of it."""
    tokens = embedding_1TD.shape[1]
    side = math.isqrt(tokens)
    if tokens - side * side not in (0, 1):
        raise UserError(
            f"A position embedding of {tokens} tokens is no square grid, with or without one "
            "class token: only square grids can be resized like this."
        )
    return side, tokens - side * side
