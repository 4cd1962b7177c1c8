"""From an edge probability map to thin responses: orientation, non-maximum suppression.

Follows the steps of Dollar and Zitnick's structured edge detection (TPAMI 2015), which the SEISM
tools use; everything works on stacks [...,H,W].
"""

from __future__ import annotations

import numpy as np

MARGIN = 1.01


def triangle_blur(image: np.ndarray, radius: int = 4) -> np.ndarray:
    """Separable triangle filter [1..r+1..1]/(r+1)^2 over the last two axes, mirrored borders.

    Float32 running sums (along rows first): the benchmark tool's rounding, which decides the
    orientation where the map is almost flat, and so which pixels survive there.
    """
    width = radius + 1
    scale = np.float32(1 / width**4)
    return _running(_running(image, -1, width, scale), -2, width, np.float32(1))


def _running(image: np.ndarray, axis: int, width: int, scale: np.float32) -> np.ndarray:
    """Unnormalised triangle filter along one axis as a twofold running sum, times `scale`."""
    lines = np.moveaxis(image, axis, 0)
    pad = [(width, width)] + [(0, 0)] * (lines.ndim - 1)
    mirrored = np.pad(lines, pad, mode="symmetric")
    size = len(lines)
    start = np.add.accumulate(lines[:width])
    first = 2 * np.add.accumulate(start)[-1] - start[-1]
    left, right = mirrored[: size - 1], mirrored[2 * width : 2 * width + size - 1]
    slope = np.add.accumulate((left + right) + np.float32(-2) * lines[:-1])
    steps = np.concatenate([(scale * first)[None], scale * slope])
    return np.moveaxis(np.add.accumulate(steps), 0, axis)


def orientation(image: np.ndarray) -> np.ndarray:
    """Direction across the edge, radians in [0, pi), from second derivatives of the blurred map.

    The benchmark's formula: the ratio of the pure derivatives is the square of the tangent, so
    directions between the axes and the diagonals are off by up to 11 degrees, and where the mixed
    derivative is exactly 0 the answer is 0.
    """
    d_y, d_x = np.gradient(triangle_blur(image), axis=(-2, -1))
    d_xx = np.gradient(d_x, axis=-1)
    d_yy, d_xy = np.gradient(d_y, axis=(-2, -1))
    return np.mod(np.arctan(d_yy * np.sign(-d_xy) / (d_xx + 1e-5)), np.pi)


def suppress(image: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """Zero every pixel whose neighbour one pixel across the edge is more than 1 % stronger."""
    height, width = image.shape[-2:]
    stack = image.reshape(-1, height, width)
    place, y, x = np.nonzero(stack)
    strength = stack[place, y, x]
    angle = direction.reshape(stack.shape)[place, y, x]
    across_x, across_y = np.cos(angle), np.sin(angle)
    weaker = np.zeros(strength.shape, bool)
    for side in (-1, 1):
        at_y, at_x = y.astype(np.float32), x.astype(np.float32)
        neighbour = _bilinear(stack, place, at_y + side * across_y, at_x + side * across_x)
        weaker |= strength * MARGIN < neighbour
    kept = stack.copy()
    kept[place[weaker], y[weaker], x[weaker]] = 0
    return kept.reshape(image.shape)


def _bilinear(stack: np.ndarray, place: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    height, width = stack.shape[-2:]
    y, x = np.clip(y, 0, height - 1.001), np.clip(x, 0, width - 1.001)
    top, left = y.astype(np.int64), x.astype(np.int64)
    down, right = y - top, x - left
    upper = (1 - right) * stack[place, top, left] + right * stack[place, top, left + 1]
    lower = (1 - right) * stack[place, top + 1, left] + right * stack[place, top + 1, left + 1]
    return (1 - down) * upper + down * lower


def fade_borders(image: np.ndarray, width: int) -> np.ndarray:
    """Multiply the k-th row and column from every side by k / width, for k < width."""
    faded = image.copy()
    for axis in (-1, -2):
        size = image.shape[axis]
        ramp = np.ones(size, image.dtype)
        reach = min(width, image.shape[-1] // 2, image.shape[-2] // 2)
        for k in range(reach):
            ramp[k] *= k / reach
            ramp[size - 1 - k] *= k / reach
        faded *= ramp if axis == -1 else ramp[:, None]
    return faded


def thin_responses(probability: np.ndarray, fade: int) -> np.ndarray:
    """Suppressed, border-faded responses float32 [...,H,W] of maps with values in [0, 1]."""
    image = np.asarray(probability, np.float32)
    return fade_borders(suppress(image, orientation(image)), fade)
