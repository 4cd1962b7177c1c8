"""Several low-rank updates as one: the ways of Hugging Face PEFT's `add_weighted_adapter`.

E updates are stacked, a [E, D, r] and b [E, r, O]; update e is a_e b_e. `weights_E` hold what each
counts, its own scale included, and may be negative. The result is a pair [D, R], [R, O] whose
product is the joint update: exact by `concatenated`, best at rank r by `truncated`, and with
products between different updates' factors otherwise. Float32.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.lowrank import stacked

Pair = tuple[Array, Array]


def concatenated(a_EDr: Array, b_ErO: Array, weights_E: Array) -> Pair:
    """The exact weighted sum, of rank E * r ("cat")."""
    return stacked(a_EDr * weights_E[:, None, None], b_ErO)


def truncated(a_EDr: Array, b_ErO: Array, weights_E: Array) -> Pair:
    """The nearest update of rank r to the weighted sum, by its singular values ("svd")."""
    sum_DO = jnp.einsum("e,edr,ero->do", weights_E, a_EDr, b_ErO, precision=lax.Precision.HIGHEST)
    left, values, right = jnp.linalg.svd(sum_DO, full_matrices=False)
    rank = a_EDr.shape[-1]
    return left[:, :rank] * values[:rank], right[:rank]


def factor_sums(a_EDr: Array, b_ErO: Array, weights_E: Array) -> Pair:
    """(sum of sign(w) sqrt|w| A, sum of sqrt|w| B), of rank r ("linear")."""
    root_E = jnp.sqrt(jnp.abs(weights_E))
    return _weighted(a_EDr, jnp.sign(weights_E) * root_E), _weighted(b_ErO, root_E)


def down_sum(a_EDr: Array, b_ErO: Array, weights_E: Array) -> Pair:
    """(sum of w A, sum of B): token-level adaptation, through "linear" of PEFT 0.4."""
    return _weighted(a_EDr, weights_E), b_ErO.sum(axis=0)


def pruned_sums(a_EDr: Array, b_ErO: Array, weights_E: Array, density: float) -> Pair:
    """`factor_sums` of factors that keep their largest entries ("magnitude_prune").

    density: the share of entries that each factor keeps.
    """
    return factor_sums(_pruned(a_EDr, density), _pruned(b_ErO, density), weights_E)


def elected_means(a_EDr: Array, b_ErO: Array, weights_E: Array, density: float) -> Pair:
    """Pruned factors, averaged over the updates that agree with the sign of the sum ("ties").

    Yadav et al., arXiv:2306.01708, with PEFT's election by the unweighted sum.
    """
    root_E = jnp.sqrt(jnp.abs(weights_E))
    a_EDr, b_ErO = _pruned(a_EDr, density), _pruned(b_ErO, density)
    return _elected(a_EDr, jnp.sign(weights_E) * root_E), _elected(b_ErO, root_E)


def _weighted(x_Eij: Array, weights_E: Array) -> Array:
    return jnp.einsum("e,eij->ij", weights_E, x_Eij, precision=lax.Precision.HIGHEST)


def _pruned(x_Eij: Array, density: float) -> Array:
    flat = jnp.abs(x_Eij).reshape(x_Eij.shape[0], -1)
    kept = int(density * flat.shape[1])
    _, places = lax.top_k(flat, kept)
    mask = jnp.zeros(flat.shape, bool).at[jnp.arange(flat.shape[0])[:, None], places].set(True)
    return jnp.where(mask.reshape(x_Eij.shape), x_Eij, 0.0)


def _elected(x_Eij: Array, weights_E: Array) -> Array:
    elected = jnp.where(x_Eij.sum(axis=0) >= 0, 1.0, -1.0)
    agrees = jnp.sign(x_Eij) == elected
    count = jnp.maximum(agrees.sum(axis=0), 1)
    return _weighted(jnp.where(agrees, x_Eij, 0.0), weights_E) / count
