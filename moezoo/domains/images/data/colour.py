"""Photometric distortion of uint8 images as the dense benchmarks use it (Liu et al., SSD, 2016).

Hue runs from 0 to 179 in steps of two degrees, saturation and value from 0 to 255, as in OpenCV.
Every change is rounded to 8 bits, as in OpenCV.
"""

from __future__ import annotations

import numpy as np

from moezoo.data.source import SourceExample

HUES = 180


def distort(example: SourceExample, rng: np.random.Generator) -> SourceExample:
    """Brightness +-32, contrast and saturation times 0.5 to 1.5, hue -18 to 17 steps of 2 degrees.

    Each with probability 1/2; contrast comes first or last, with probability 1/2 each.
    """
    wanted = rng.random(5) < 0.5
    brightness, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), int(rng.integers(-18, 18))
    image = example["image"]
    contrast_first = wanted[4]
    if wanted[0]:
        image = linear(image, shift=brightness)
    if wanted[1] and contrast_first:
        image = linear(image, factor=contrast)
    if wanted[2] or wanted[3]:
        image = recoloured(image, saturation if wanted[2] else 1.0, hue if wanted[3] else 0)
    if wanted[1] and not contrast_first:
        image = linear(image, factor=contrast)
    return example | {"image": image}


def linear(image: np.ndarray, factor: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """uint8 of factor * image + shift, clipped, then rounded down."""
    levels = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
    return np.clip(levels, 0, 255).astype(np.uint8)[image]


def recoloured(image_HW3: np.ndarray, saturation: float = 1.0, hue: int = 0) -> np.ndarray:
    """Saturation multiplied (and rounded down to 8 bits), hue turned by steps of two degrees."""
    h, s, v = to_hsv(image_HW3)
    if saturation != 1.0:
        s = linear(s, factor=saturation)
    if hue:
        h = ((np.arange(HUES) + hue) % HUES).astype(np.uint8)[h]
    return from_hsv(h, s, v)


def _reciprocals(scale: float) -> np.ndarray:
    table = np.zeros(256, np.int32)
    table[1:] = np.rint((1 << 12) * scale / np.arange(1, 256))
    return table


_BY_VALUE, _BY_RANGE = _reciprocals(255.0), _reciprocals(HUES / 6.0)  # in 1/4096


def to_hsv(image_HW3: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue (0..179), saturation and value, uint8 [H,W] each, in OpenCV's fixed-point arithmetic."""
    r, g, b = (np.ascontiguousarray(image_HW3[..., k]) for k in range(3))
    v = np.maximum(np.maximum(r, g), b)
    spread = v - np.minimum(np.minimum(r, g), b)
    s = (spread * _BY_VALUE[v] + 2048) >> 12
    r, g, b, d = (x.astype(np.int16) for x in (r, g, b, spread))
    h = np.where(v == r, g - b, np.where(v == g, b - r + 2 * d, r - g + 4 * d))
    h = (h * _BY_RANGE[spread] + 2048) >> 12
    h += HUES * (h < 0)
    return h.astype(np.uint8), s.astype(np.uint8), v


def from_hsv(h: np.ndarray, s: np.ndarray, v: np.ndarray) -> np.ndarray:
    """uint8 [H,W,3] from hue (0..179), saturation and value."""
    value = v.astype(np.float32)
    chroma = value * s.astype(np.float32)
    chroma *= np.float32(1 / 255)
    value += np.float32(0.5)  # the conversion to integers truncates
    planes = [value - chroma * falling[h] for falling in _FALLING]
    return np.stack(planes, -1, out=np.empty((*h.shape, 3), np.uint8), casting="unsafe")


def _falling() -> np.ndarray:
    """How much of the chroma red, green and blue lack at each hue, float32 [3,180]."""
    place = np.arange(HUES) * (6.0 / HUES)
    distance = [np.abs((place - centre + 3.0) % 6.0 - 3.0) for centre in (0.0, 2.0, 4.0)]
    return np.clip(np.stack(distance) - 1.0, 0.0, 1.0).astype(np.float32)


_FALLING = _falling()
