"""Groups of alike adapters: model-based clustering of a library of LoRAs.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs"
(arXiv:2405.11157, section 3): an adapter's parameters in one row lose all but their largest, an SVD
makes rows short, and k-means groups the rows of the matrix of their cosines. NumPy on the host, in
float64: the same adapters and seed give the same groups.
"""

from __future__ import annotations

import numpy as np

from moezoo.ops.kmeans import SMALLEST, Clusters, kmeans


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
) -> Clusters:
    """Adapters that are alike, each a row of parameters; the centres are rows of cosines.

    dropped: share of parameters that is set to 0. parts: singular directions that are kept.
    Raises UserError for more groups than different adapters.
    """
    return kmeans(cosines(sparsified(rows_NP, dropped), parts), groups, rng)


def distinct(rows_NP: np.ndarray, *, dropped: float, parts: int) -> int:
    """How many adapters are different in what `alike` sees of them: it makes no more groups."""
    return len(np.unique(cosines(sparsified(rows_NP, dropped), parts), axis=0))
