"""k-means: groups of rows that lie near each other, by distance or, spherically, by direction.

Lloyd's rounds after k-means++ (Arthur and Vassilvitskii, SODA 2007): rows belong to their nearest
centre, and a centre lies amid its rows; both steps lower

    sum over rows of far(x_n, c_e(n))

where far is the squared distance, or spherically (Dhillon and Modha, "Concept decompositions for
large sparse text data using clustering", Machine Learning 42, 2001, eq. 7) 1 - x_n . c_e(n) for
rows and centres of length 1. A router without a bias decides by inner products, too: with spherical
centres as its columns every token's first choice is the expert of its own cluster. NumPy on the
host, in float64: the same rows and seed give the same centres.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moezoo.errors import UserError

ROUNDS = 300  # at most; late ones move a few rows between two centres
SMALLEST = 1e-12  # length of a row that has a direction


class Clusters(NamedTuple):
    """centres_ED, the cluster of each row int [N], and the sum of the rows' far from centres."""

    centres_ED: np.ndarray
    cluster_N: np.ndarray
    far: float


class Geometry(NamedTuple):
    """How far rows [N, D] are from centres [E, D] (at least 0), and the centres [E, D] amid rows.

    The second takes rows, their clusters, and the centres so far.
    """

    far: Callable[[np.ndarray, np.ndarray], np.ndarray]
    amid: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def kmeans(
    x_ND: np.ndarray, clusters: int, rng: np.random.Generator, *, starts: int = 10
) -> Clusters:
    """By squared distance: the best of `starts` beginnings; no cluster is empty.

    Raises UserError where fewer different rows than clusters are given.
    """
    x_ND = np.asarray(x_ND, np.float64)
    distinct = len(np.unique(x_ND, axis=0))
    if not 1 <= clusters <= distinct:
        raise UserError(
            f"{distinct} different members make no {clusters} clusters that all have an example: "
            "take fewer clusters, or more members."
        )
    return _best(x_ND, clusters, rng, PLANE, starts)


def spherical_kmeans(
    x_ND: np.ndarray, clusters: int, rng: np.random.Generator, *, starts: int = 4
) -> Clusters:
    """By direction: the best of `starts` beginnings, centres of length 1; no cluster is empty.

    Tokens of length 0 have no direction and are not among the N of the result. Raises UserError
    where fewer tokens than clusters have different directions.
    """
    x_ND = np.asarray(x_ND, np.float64)
    length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
    x_ND = x_ND[length_N1[:, 0] > SMALLEST] / length_N1[length_N1[:, 0] > SMALLEST]
    distinct = len(np.unique(x_ND.round(12), axis=0)) if len(x_ND) <= 64 * clusters else clusters
    if distinct < clusters:
        raise UserError(
            f"{distinct} tokens of different directions make no {clusters} clusters: take routers "
            "that begin fresh, or data of more tokens."
        )
    return _best(x_ND, clusters, rng, SPHERE, starts)


def _squares(x_ND: np.ndarray, centres_ED: np.ndarray) -> np.ndarray:
    # One centre at a time: [N, E, D] of many tokens is more than a host has.
    return np.stack([((x_ND - centre_D) ** 2).sum(-1) for centre_D in centres_ED], axis=1)


def _means(x_ND: np.ndarray, cluster_N: np.ndarray, centres_ED: np.ndarray) -> np.ndarray:
    return np.stack([x_ND[cluster_N == e].mean(0) for e in range(len(centres_ED))])


def _angles(x_ND: np.ndarray, centres_ED: np.ndarray) -> np.ndarray:
    return np.maximum(1.0 - x_ND @ centres_ED.T, 0.0)


def _directions(x_ND: np.ndarray, cluster_N: np.ndarray, centres_ED: np.ndarray) -> np.ndarray:
    sums_ED = np.zeros_like(centres_ED)
    np.add.at(sums_ED, cluster_N, x_ND)
    length_E1 = np.linalg.norm(sums_ED, axis=1, keepdims=True)
    # Tokens that cancel each other have no mean direction: such a centre stays where it was.
    return np.where(length_E1 > SMALLEST, sums_ED / np.maximum(length_E1, SMALLEST), centres_ED)


PLANE = Geometry(_squares, _means)
SPHERE = Geometry(_angles, _directions)


def _best(
    x_ND: np.ndarray, clusters: int, rng: np.random.Generator, space: Geometry, starts: int
) -> Clusters:
    begun = (_spread_out(x_ND, clusters, rng, space) for _ in range(starts))
    return min((_refined(x_ND, first_ED, space) for first_ED in begun), key=lambda one: one.far)


def _spread_out(
    x_ND: np.ndarray, clusters: int, rng: np.random.Generator, space: Geometry
) -> np.ndarray:
    """Rows to begin with, each drawn by how far it is from those before (k-means++)."""
    chosen = [int(rng.integers(len(x_ND)))]
    far_N = np.full(len(x_ND), np.inf)
    for _ in range(clusters - 1):
        far_N = np.minimum(far_N, space.far(x_ND, x_ND[chosen[-1:]])[:, 0])
        total = far_N.sum()
        chosen.append(int(rng.choice(len(x_ND), p=far_N / total if total > 0 else None)))
    return x_ND[chosen]


def _refined(x_ND: np.ndarray, centres_ED: np.ndarray, space: Geometry) -> Clusters:
    """Rows to their nearest centre and centres amid their rows, until nothing changes."""
    cluster_N = np.full(len(x_ND), -1)
    for _ in range(ROUNDS):
        nearest_N = _without_empty(space.far(x_ND, centres_ED))
        if np.array_equal(nearest_N, cluster_N):
            break
        cluster_N = nearest_N
        centres_ED = space.amid(x_ND, cluster_N, centres_ED)
    far = float(space.far(x_ND, centres_ED)[np.arange(len(x_ND)), cluster_N].sum())
    return Clusters(centres_ED, cluster_N, far)


def _without_empty(far_NE: np.ndarray) -> np.ndarray:
    """The nearest centre of each row; a centre without any takes the row farthest from its own
    among clusters of several."""
    nearest_N = far_NE.argmin(1)
    own_N = far_NE.min(1)
    for empty in np.flatnonzero(np.bincount(nearest_N, minlength=far_NE.shape[1]) == 0):
        sizes_E = np.bincount(nearest_N, minlength=far_NE.shape[1])
        worst = np.where(sizes_E[nearest_N] > 1, own_N, -np.inf).argmax()
        nearest_N[worst], own_N[worst] = empty, -np.inf
    return nearest_N
