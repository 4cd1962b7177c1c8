"""Thinning of binary masks to lines one pixel wide (Guo and Hall, 1989, two sub-iterations)."""

from __future__ import annotations

import numpy as np


def _removable(mask: np.ndarray, odd: bool) -> np.ndarray:
    p = np.pad(mask, 1)
    n, s, w, e = p[:-2, 1:-1], p[2:, 1:-1], p[1:-1, :-2], p[1:-1, 2:]
    nw, ne, sw, se = p[:-2, :-2], p[:-2, 2:], p[2:, :-2], p[2:, 2:]
    crossings = (
        (~n & (ne | e)).astype(np.int8)
        + (~e & (se | s)).astype(np.int8)
        + (~s & (sw | w)).astype(np.int8)
        + (~w & (nw | n)).astype(np.int8)
    )
    first = (nw | n).astype(np.int8) + (ne | e) + (se | s) + (sw | w)
    second = (n | ne).astype(np.int8) + (e | se) + (s | sw) + (w | nw)
    neighbours = np.minimum(first, second)
    side = (n | ne | ~se) & e if odd else (s | sw | ~nw) & w
    return mask & (crossings == 1) & (neighbours >= 2) & (neighbours <= 3) & ~side


def thin(mask: np.ndarray) -> np.ndarray:
    """A bool mask [H,W] with every line thinned to one pixel, connectivity kept."""
    mask = mask.astype(bool)
    while True:
        before = mask
        for odd in (True, False):
            mask = mask & ~_removable(mask, odd)
        if (mask == before).all():
            return mask
