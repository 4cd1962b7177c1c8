"""Images and label maps at another size, sampled as in OpenCV.

With a `box` (rows, columns) only that window of the result is computed.
"""

from __future__ import annotations

import numpy as np

Size = tuple[int, int]
Box = tuple[slice, slice]
WHOLE = (slice(None), slice(None))


def nearest(values: np.ndarray, size: Size, box: Box = WHOLE) -> np.ndarray:
    """The pixels at floor(place * old / new), [H,W,...] -> [size,...]; keeps the type.

    These are OpenCV's nearest pixels, half a pixel away from those of other libraries.
    """
    rows, columns = (
        _lower(n, m)[part] for n, m, part in zip(values.shape[:2], size, box, strict=True)
    )
    return np.take(np.take(values, rows, 0), columns, 1)


def _lower(old: int, new: int) -> np.ndarray:
    step = 1.0 / (new / old)
    return np.minimum(np.floor(np.arange(new) * step).astype(np.intp), old - 1)


def linear(image_HWC: np.ndarray, size: Size, box: Box = WHOLE) -> np.ndarray:
    """Bilinear, centres of pixels correspond, no low-pass filter before shrinking; float32."""
    (r0, r1, fr), (c0, c1, fc) = (
        _between(n, m, part) for n, m, part in zip(image_HWC.shape[:2], size, box, strict=True)
    )
    lines = _mixed(np.take(image_HWC, r0, 0), np.take(image_HWC, r1, 0), fr[:, None, None])
    return _mixed(np.take(lines, c0, 1), np.take(lines, c1, 1), fc[:, None])


def _mixed(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    first = first.astype(np.float32, copy=False)
    mixed = second.astype(np.float32, copy=False) - first
    mixed *= share
    mixed += first
    return mixed


def _between(old: int, new: int, part: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two old pixels around each new one, and how far it lies towards the second."""
    centre = np.clip((np.arange(new)[part] + 0.5) * (old / new) - 0.5, 0, old - 1)
    lower = np.floor(centre).astype(np.intp)
    return lower, np.minimum(lower + 1, old - 1), (centre - lower).astype(np.float32)
