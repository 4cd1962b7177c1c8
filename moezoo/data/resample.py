"""Images and label maps at another size, sampled as OpenCV samples them."""

from __future__ import annotations

import numpy as np


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels at floor(place * old / new), [H,W,...] -> [size,...]; keeps the type.

    These are OpenCV's nearest pixels, half a pixel away from those of other libraries.
    """
    rows, columns = (_lower(n, m) for n, m in zip(values.shape[:2], size, strict=True))
    return np.take(np.take(values, rows, 0), columns, 1)


def _lower(old: int, new: int) -> np.ndarray:
    step = 1.0 / (new / old)
    return np.minimum(np.floor(np.arange(new) * step).astype(np.intp), old - 1)


def linear(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, centres of pixels correspond, no low-pass filter before shrinking; float32."""
    place = [_between(n, m) for n, m in zip(image_HWC.shape[:2], size, strict=True)]
    (r0, r1, fr), (c0, c1, fc) = place
    image = image_HWC.astype(np.float32)
    upper = np.take(image, r0, 0)
    lines = np.take(image, r1, 0)
    lines -= upper
    lines *= fr[:, None, None]
    lines += upper
    left = np.take(lines, c0, 1)
    mixed = np.take(lines, c1, 1)
    mixed -= left
    mixed *= fc[:, None]
    mixed += left
    return mixed


def _between(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two old pixels around each new one, and how far it lies towards the second."""
    centre = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    lower = np.floor(centre).astype(np.intp)
    return lower, np.minimum(lower + 1, old - 1), (centre - lower).astype(np.float32)
