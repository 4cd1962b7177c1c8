"""Spherical k-means: directions that tokens gather around, for routers that begin with them.

Dhillon and Modha, "Concept decompositions for large sparse text data using clustering" (Machine
Learning 42, 2001): tokens of length 1 belong to the centre c_e of length 1 with which their inner
product is largest, and a centre is the direction of the sum of its tokens; both steps raise

    sum over tokens of x_n . c_e(n)                                                       (eq. 7)

A router without a bias decides by inner products, too: with the centres as its columns every
token's first choice is the expert of its own cluster. NumPy on the host, in float64: the same
tokens and seed give the same centres.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moezoo.errors import UserError

ROUNDS = 50  # at most; what moves after these are a few tokens between two centres
STARTS = 4  # beginnings that are tried, of which the best is kept
SMALLEST = 1e-12  # length of a token that has a direction


class Clusters(NamedTuple):
    """centres_ED of length 1, the cluster of each token int [N], and the mean of eq. 7's terms.

    Tokens of length 0 have no direction and are not among the N.
    """

    centres_ED: np.ndarray
    cluster_N: np.ndarray
    cosine: float


def spherical_kmeans(x_ND: np.ndarray, clusters: int, rng: np.random.Generator) -> Clusters:
    """The best of a few beginnings; no cluster is empty.

    Raises UserError where fewer tokens than clusters have different directions.
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
    found = [_refined(x_ND, _spread_out(x_ND, clusters, rng)) for _ in range(STARTS)]
    return max(found, key=lambda one: one.cosine)


def _spread_out(x_ND: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens to begin with, each drawn by how far it is from those before (k-means++)."""
    chosen = [int(rng.integers(len(x_ND)))]
    far_N = np.full(len(x_ND), np.inf)
    for _ in range(clusters - 1):
        # Between points of length 1 the squared distance is twice this.
        far_N = np.minimum(far_N, np.maximum(1.0 - x_ND @ x_ND[chosen[-1]], 0.0))
        total = far_N.sum()
        share_N = far_N / total if total > 0 else None
        chosen.append(int(rng.choice(len(x_ND), p=share_N)))
    return x_ND[chosen]


def _refined(x_ND: np.ndarray, centres_ED: np.ndarray) -> Clusters:
    """Tokens to their nearest centre and centres amid their tokens, until nothing changes."""
    cluster_N = np.full(len(x_ND), -1)
    for _ in range(ROUNDS):
        cosine_NE = x_ND @ centres_ED.T
        nearest_N = _without_empty(cosine_NE)
        if np.array_equal(nearest_N, cluster_N):
            break
        cluster_N = nearest_N
        sums_ED = np.zeros_like(centres_ED)
        np.add.at(sums_ED, cluster_N, x_ND)
        length_E1 = np.linalg.norm(sums_ED, axis=1, keepdims=True)
        # Tokens that cancel each other have no mean direction: such a centre stays where it was.
        centres_ED = np.where(
            length_E1 > SMALLEST, sums_ED / np.maximum(length_E1, SMALLEST), centres_ED
        )
    cosine = float((x_ND * centres_ED[cluster_N]).sum(1).mean())
    return Clusters(centres_ED, cluster_N, cosine)


def _without_empty(cosine_NE: np.ndarray) -> np.ndarray:
    """The nearest centre of each token; a centre without any takes the token farthest from its own
    among clusters of several."""
    nearest_N = cosine_NE.argmax(1)
    own_N = cosine_NE.max(1)
    for empty in np.flatnonzero(np.bincount(nearest_N, minlength=cosine_NE.shape[1]) == 0):
        sizes_E = np.bincount(nearest_N, minlength=cosine_NE.shape[1])
        worst = np.where(sizes_E[nearest_N] > 1, own_N, np.inf).argmin()
        nearest_N[worst], own_N[worst] = empty, np.inf
    return nearest_N
