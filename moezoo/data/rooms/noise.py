"""Cheap lattice noise from one fixed table."""

from __future__ import annotations

import numpy as np

_SIZE = 64
_TABLE = np.random.default_rng(20240607).random((_SIZE, _SIZE), dtype=np.float32)


def cells(u_N: np.ndarray, v_N: np.ndarray, seed: int) -> np.ndarray:
    """One random number in [0,1) per unit cell of the (u, v) plane."""
    i = (np.floor(u_N).astype(np.int32) + 7 * seed) % _SIZE
    j = (np.floor(v_N).astype(np.int32) + 13 * seed) % _SIZE
    return _TABLE[i, j]


def smooth(u_N: np.ndarray, v_N: np.ndarray, seed: int) -> np.ndarray:
    """Value noise in [0,1], about one bump per unit."""
    i, j = np.floor(u_N), np.floor(v_N)
    fu, fv = u_N - i, v_N - j
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    i0 = (i.astype(np.int32) + 7 * seed) % _SIZE
    j0 = (j.astype(np.int32) + 13 * seed) % _SIZE
    i1, j1 = (i0 + 1) % _SIZE, (j0 + 1) % _SIZE
    low = _TABLE[i0, j0] + fu * (_TABLE[i1, j0] - _TABLE[i0, j0])
    high = _TABLE[i0, j1] + fu * (_TABLE[i1, j1] - _TABLE[i0, j1])
    return low + fv * (high - low)
