"""Thinning of binary images to lines of one pixel.

The parallel algorithm A1 of Lam, Lee and Suen, "Thinning Methodologies - A Comprehensive Survey"
(TPAMI 1992), after Guo and Hall (CACM 1989): the result equals MATLAB's `bwmorph(.., 'thin', Inf)`.
"""

from __future__ import annotations

import numpy as np

# Neighbours x1..x8, counter-clockwise from the east, as (row, column) steps.
NEIGHBOURS = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """For both half-steps: may a pixel go, given the 8-bit code of its neighbours?"""
    codes = np.arange(256)
    x = [((codes >> k) & 1).astype(bool) for k in range(8)]
    ring = [*x, x[0]]
    crossings = sum((~ring[k] & (ring[k + 1] | ring[k + 2])).astype(int) for k in (0, 2, 4, 6))
    pairs_odd = sum((ring[k] | ring[k + 1]).astype(int) for k in (0, 2, 4, 6))
    pairs_even = sum((ring[k] | ring[k + 1]).astype(int) for k in (1, 3, 5, 7))
    fewest = np.minimum(pairs_odd, pairs_even)
    simple = (crossings == 1) & (fewest >= 2) & (fewest <= 3)
    first = simple & ~((x[1] | x[2] | ~x[7]) & x[0])
    second = simple & ~((x[5] | x[6] | ~x[3]) & x[4])
    return first, second


TABLES = _tables()


def thin(binary: np.ndarray) -> np.ndarray:
    """Thin a stack of binary images [...,H,W] until nothing changes; bool, same shape."""
    image = np.asarray(binary, bool)
    height, width = image.shape[-2:]
    stack = image.reshape(-1, height, width)
    padded = np.zeros((len(stack), height + 2, width + 2), np.uint8)
    padded[:, 1:-1, 1:-1] = stack
    flat = padded.reshape(-1)
    steps = [row * (width + 2) + column for row, column in NEIGHBOURS]
    alive = np.flatnonzero(flat)
    while True:
        before = len(alive)
        for table in TABLES:
            code = np.zeros(len(alive), np.uint8)
            for bit, step in enumerate(steps):
                code |= flat[alive + step] << np.uint8(bit)
            gone = table[code]
            flat[alive[gone]] = 0
            alive = alive[~gone]
        if len(alive) == before:
            return padded[:, 1:-1, 1:-1].astype(bool).reshape(image.shape)
