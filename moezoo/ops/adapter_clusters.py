"""AdapterGroups of alike adapters: model-based clustering, and k-means by distance.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs"
(arXiv:2405.11157, section 3): an adapter's parameters in one row lose all but their largest, an SVD
makes rows short, and k-means groups the rows of the matrix of their cosines. NumPy on the host, in
float64: the same adapters and seed give the same groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moezoo.errors import UserError

ROUNDS = 300  # at most, of which k-means takes a few
STARTS = 10  # beginnings that are tried, as published
SMALLEST = 1e-12


class AdapterGroups(NamedTuple):
    """centres_CD, the group of each row int [N], and the sum of squared distances from centres."""

    centres_CD: np.ndarray
    group_N: np.ndarray
    spread: float


def sparsified(rows_NP: np.ndarray, dropped: float) -> np.ndarray:
    """Each row with 0 in place of what is not above its quantile `dropped` of absolute values."""
    size_NP = np.abs(np.asarray(rows_NP, np.float64))
    limit_N1 = np.quantile(size_NP, dropped, axis=1, keepdims=True)
    return np.where(size_NP > limit_N1, rows_NP, 0.0)


def cosines(rows_NP: np.ndarray, parts: int) -> np.ndarray:
    """Cosines [N, N] of rows in their `parts` first singular directions; 0 for a row of zeros.

    From the inner products of the N rows, since P is large: exact where the published code draws.
    """
    rows_NP = np.asarray(rows_NP, np.float64)
    values_N, left_NN = np.linalg.eigh(rows_NP @ rows_NP.T)
    kept = np.argsort(values_N)[::-1][:parts]
    short_NC = left_NN[:, kept] * np.sqrt(np.maximum(values_N[kept], 0.0))
    length_N1 = np.linalg.norm(short_NC, axis=1, keepdims=True)
    unit_NC = np.where(length_N1 > SMALLEST, short_NC / np.maximum(length_N1, SMALLEST), 0.0)
    return unit_NC @ unit_NC.T


def alike(
    rows_NP: np.ndarray, groups: int, rng: np.random.Generator, *, dropped: float, parts: int
) -> AdapterGroups:
    """Adapters that are alike, each a row of parameters; the centres are rows of cosines.

    dropped: share of parameters that is set to 0. parts: singular directions that are kept.
    Raises UserError for more groups than different adapters.
    """
    return kmeans(cosines(sparsified(rows_NP, dropped), parts), groups, rng)


def kmeans(x_ND: np.ndarray, groups: int, rng: np.random.Generator) -> AdapterGroups:
    """The best of a few beginnings; no group is empty. Lloyd's rounds after k-means++.

    Raises UserError where fewer different rows than groups are given.
    """
    x_ND = np.asarray(x_ND, np.float64)
    distinct = len(np.unique(x_ND, axis=0))
    if not 1 <= groups <= distinct:
        raise UserError(
            f"{distinct} different members make no {groups} clusters that all have an example: "
            "take fewer clusters, or more members."
        )
    found = [_refined(x_ND, _spread_out(x_ND, groups, rng)) for _ in range(STARTS)]
    return min(found, key=lambda one: one.spread)


def _squares(x_ND: np.ndarray, centres_CD: np.ndarray) -> np.ndarray:
    return ((x_ND[:, None] - centres_CD) ** 2).sum(-1)


def _spread_out(x_ND: np.ndarray, groups: int, rng: np.random.Generator) -> np.ndarray:
    """Rows to begin with, each drawn by its squared distance from those before."""
    chosen = [int(rng.integers(len(x_ND)))]
    for _ in range(groups - 1):
        far_N = _squares(x_ND, x_ND[chosen]).min(1)
        chosen.append(int(rng.choice(len(x_ND), p=far_N / far_N.sum())))
    return x_ND[chosen]


def _refined(x_ND: np.ndarray, centres_CD: np.ndarray) -> AdapterGroups:
    group_N = np.full(len(x_ND), -1)
    for _ in range(ROUNDS):
        square_NC = _squares(x_ND, centres_CD)
        near_N = square_NC.argmin(1)
        own_N = square_NC.min(1)
        for empty in np.setdiff1d(np.arange(len(centres_CD)), near_N):
            # It takes the row farthest from its own centre among groups of several.
            several_N = np.bincount(near_N, minlength=len(centres_CD))[near_N] > 1
            farthest = np.where(several_N, own_N, -np.inf).argmax()
            near_N[farthest], own_N[farthest] = empty, -np.inf
        if np.array_equal(near_N, group_N):
            break
        group_N = near_N
        centres_CD = np.stack([x_ND[group_N == c].mean(0) for c in range(len(centres_CD))])
    spread = float(((x_ND - centres_CD[group_N]) ** 2).sum())
    return AdapterGroups(centres_CD, group_N, spread)
