"""Low-rank updates of a linear map: mixtures of them as matrix products, and several joined to one.

A bank of R ranks is `a_DR` and `b_RO`; E experts are E equal blocks of its ranks, one after the
other, and a gate per token and expert multiplies a block. E=1 is plain LoRA (Hu et al.,
arXiv:2106.09685), a block of r ranks one LoRA of a mixture, E=R SMoRA (arXiv:2501.15103, section
3). All ranks are computed and the gates mask: at usual sizes ranks that are not wanted cost less
than gathering those that are, on a GPU, too (bench/README.md has the floors of both).

Joined updates follow Hugging Face PEFT's `add_weighted_adapter`. They are stacked, a [E, D, r] and
b [E, r, O]; `weights_E` hold the weight of each, its own scale included, and may be negative. The
result is a pair [D, R], [R, O] whose product is the joint update: exact by `concatenated`, the best
one of rank r by `truncated`, and otherwise with products of different updates' factors. Float32.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.routing import Routing

# (x_ND, a, b, gates_NE) -> y_NO
Combine = Callable[[Array, Array, Array, Array], Array]


def plain(x_ND: Array, a_DR: Array, b_RO: Array) -> Array:
    """x A B without gates, [N, O]."""
    return (x_ND @ a_DR) @ b_RO


def by_block(x_ND: Array, a_DR: Array, b_RO: Array, gates_NE: Array) -> Array:
    """Sum over experts of gate times x A_e B_e, [N, O]; E divides R.

    The gates are those of `routing.dense_weights`: 0 where an expert was not chosen.
    """
    return (x_ND @ a_DR * _repeated(gates_NE, a_DR.shape[1], x_ND.dtype)) @ b_RO


def by_factor(x_ND: Array, a_DR: Array, b_RO: Array, gates_NE: Array) -> Array:
    """x (sum of gate A_e) (sum of gate B_e), [N, O]: with products across experts.

    SMEAR (arXiv:2306.03745) and Polytropon mix like this. No mixed matrix is ever formed.
    """
    n, e = gates_NE.shape
    weights_NE = gates_NE.astype(x_ND.dtype)
    # x first, then the gates: mixed factors would be a pair of matrices for every token.
    h_NER = (x_ND @ a_DR).reshape(n, e, a_DR.shape[1] // e)
    mixed_NR = jnp.einsum("ner,ne->nr", h_NER, weights_NE)
    return jnp.einsum("nr,ne->ner", mixed_NR, weights_NE).reshape(n, b_RO.shape[0]) @ b_RO


def by_down(x_ND: Array, a_DR: Array, b_RO: Array, gates_NE: Array) -> Array:
    """x (sum of gate A_e) (sum of B_e), [N, O]: token-level adaptation, which weighs A alone.

    arXiv:2311.10847 through "linear" of PEFT 0.4; `down_sum` is its pair under constant gates.
    """
    n, e = gates_NE.shape
    h_NEr = (x_ND @ a_DR).reshape(n, e, a_DR.shape[1] // e)
    mixed_Nr = jnp.einsum("ner,ne->nr", h_NEr, gates_NE.astype(x_ND.dtype))
    return mixed_Nr @ b_RO.reshape(e, -1, b_RO.shape[1]).sum(0)


def one_down(x_ND: Array, a_Dr: Array, b_RO: Array, gates_NE: Array) -> Array:
    """x A (sum of gate B_e), [N, O]: experts share a_Dr [D, R/E]; HydraLoRA (arXiv:2404.19245)."""
    n = x_ND.shape[0]
    h_Nr = x_ND @ a_Dr
    spread_NEr = h_Nr[:, None] * gates_NE[..., None].astype(x_ND.dtype)
    return spread_NEr.reshape(n, b_RO.shape[0]) @ b_RO


def gathered(x_ND: Array, a_DR: Array, b_RO: Array, routing: Routing, block: int = 1) -> Array:
    """`by_block`, computing only the ranks of the chosen experts, [N, O].

    Gathers K * block columns and rows per token: for single tokens and very many ranks.
    """
    offsets = jnp.arange(block, dtype=jnp.int32)
    # -1 takes the ranks of expert 0, with weight 0.
    ranks_NS = jnp.maximum(routing.experts_NK, 0)[..., None] * block + offsets
    ranks_NS = ranks_NS.reshape(ranks_NS.shape[0], ranks_NS.shape[1] * block)
    weights_NS = jnp.repeat(routing.weights_NK, block, axis=1).astype(x_ND.dtype)
    h_NS = chosen_columns(x_ND, a_DR, ranks_NS) * weights_NS
    return chosen_rows(h_NS, b_RO, ranks_NS)


def chosen_columns(x_ND: Array, a_DR: Array, ranks_NS: Array) -> Array:
    """Each token times S columns of its own, [N, S]; ranks_NS int32."""
    return jnp.einsum("nd,nsd->ns", x_ND, a_DR.T[ranks_NS])


def chosen_rows(h_NS: Array, b_RO: Array, ranks_NS: Array) -> Array:
    """Sum of S rows of its own for each token, weighted by h_NS, [N, O]."""
    return jnp.einsum("ns,nso->no", h_NS, b_RO[ranks_NS])


def stacked(a_EDr: Array, b_ErO: Array) -> tuple[Array, Array]:
    """E adapters as one bank: a [D, E*r], b [E*r, O]."""
    experts, width, rank = a_EDr.shape
    a_DR = jnp.swapaxes(a_EDr, 0, 1).reshape(width, experts * rank)
    return a_DR, b_ErO.reshape(experts * rank, -1)


def unstacked(a_DR: Array, b_RO: Array, experts: int) -> tuple[Array, Array]:
    """Inverse of `stacked`: a [E, D, r], b [E, r, O]."""
    a_EDr = jnp.swapaxes(a_DR.reshape(a_DR.shape[0], experts, -1), 0, 1)
    return a_EDr, b_RO.reshape(experts, -1, b_RO.shape[1])


def delta(
    a_DR: Array, b_RO: Array, gates_E: Array | None = None, combine: Combine = by_block
) -> Array:
    """The matrix [D, O] that a bank adds, under constant gates if there are any; exact."""
    # It goes into a kernel for good, so TF32 or bfloat16 products would round it for good.
    with jax.default_matmul_precision("highest"):
        if gates_E is None:
            return a_DR @ b_RO
        # The identity's rows as tokens: any `combine` gives its matrix, however it mixes.
        unit_DD = jnp.eye(a_DR.shape[0], dtype=a_DR.dtype)
        gates_DE = jnp.broadcast_to(gates_E, (unit_DD.shape[0], gates_E.shape[0]))
        return combine(unit_DD, a_DR, b_RO, gates_DE)


def _repeated(gates_NE: Array, ranks: int, dtype: jnp.dtype) -> Array:
    """Each expert's gate once per rank of its block, [N, R]."""
    n, e = gates_NE.shape
    wide_NEr = jnp.broadcast_to(gates_NE[..., None], (n, e, ranks // e))
    return wide_NEr.reshape(n, ranks).astype(dtype)


FactorPair = tuple[Array, Array]


def concatenated(a_EDr: Array, b_ErO: Array, weights_E: Array) -> FactorPair:
    """The exact weighted sum, of rank E * r ("cat")."""
    return stacked(a_EDr * weights_E[:, None, None], b_ErO)


def truncated(a_EDr: Array, b_ErO: Array, weights_E: Array) -> FactorPair:
    """The nearest update of rank r to the weighted sum, by its singular values ("svd")."""
    sum_DO = jnp.einsum("e,edr,ero->do", weights_E, a_EDr, b_ErO, precision=lax.Precision.HIGHEST)
    left, values, right = jnp.linalg.svd(sum_DO, full_matrices=False)
    rank = a_EDr.shape[-1]
    # Only the product counts, so one factor takes the singular values whole.
    return left[:, :rank] * values[:rank], right[:rank]


def factor_sums(a_EDr: Array, b_ErO: Array, weights_E: Array) -> FactorPair:
    """(sum of sign(w) sqrt|w| A, sum of sqrt|w| B), of rank r ("linear")."""
    root_E = jnp.sqrt(jnp.abs(weights_E))
    # Roots, because the product of both factors has each weight twice; the sign goes into one.
    return _weighted(a_EDr, jnp.sign(weights_E) * root_E), _weighted(b_ErO, root_E)


def down_sum(a_EDr: Array, b_ErO: Array, weights_E: Array) -> FactorPair:
    """(sum of w A, sum of B): token-level adaptation, through "linear" of PEFT 0.4."""
    return _weighted(a_EDr, weights_E), b_ErO.sum(axis=0)


def pruned_sums(a_EDr: Array, b_ErO: Array, weights_E: Array, density: float) -> FactorPair:
    """`factor_sums` of factors that keep their largest entries ("magnitude_prune").

    density: the share of entries that each factor keeps.
    """
    return factor_sums(_pruned(a_EDr, density), _pruned(b_ErO, density), weights_E)


def elected_means(a_EDr: Array, b_ErO: Array, weights_E: Array, density: float) -> FactorPair:
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
    # Not `jnp.sign`: a sum of 0 elects +1, as in PEFT.
    elected = jnp.where(x_Eij.sum(axis=0) >= 0, 1.0, -1.0)
    agrees = jnp.sign(x_Eij) == elected
    count = jnp.maximum(agrees.sum(axis=0), 1)
    return _weighted(jnp.where(agrees, x_Eij, 0.0), weights_E) / count
