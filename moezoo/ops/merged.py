"""Linear maps that are mixed before the product, and which mixture each token is under.

W(c) = sum_e g_e(c) W_e once per row of a condition, then one dense product per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

EXACT = jax.lax.Precision.HIGHEST


@dataclass(frozen=True)
class Segments:
    """Which row of a condition the tokens of a sequence are under.

    splits: where the second, third, ... segment begins, ascending; () = one segment.
    rows: the row of each segment, the same in every example of the batch.
    rows_BS: int32 [B, S] in its place, where examples are under different rows.
    """

    splits: tuple[int, ...] = ()
    rows: tuple[int, ...] = (0,)
    rows_BS: Array | None = None


WHOLE = Segments()


def merge(stack_E: Array, weights_RE: Array) -> Array:
    """The R mixtures of E stacked arrays: [E, ...] and [R, E] to float32 [R, ...]."""
    weights_RE = weights_RE.astype(jnp.float32)
    return jnp.tensordot(weights_RE, stack_E.astype(jnp.float32), axes=1, precision=EXACT)


def by_segment(
    x_BTI: Array,
    kernel_RIO: Array | Sequence[Array],
    bias_RO: Array | Sequence[Array],
    where: Segments = WHOLE,
) -> Array:
    """Every token times the matrix of its row, plus that row's bias: [B, T, O].

    The products are those of one dense layer, whatever the number of rows. Where examples differ
    (`where.rows_BS`) each has a copy of its matrix, B of them at a time, picked from R.
    Raises ValueError where `where` does not split T tokens or does not name a row per segment.
    """
    _check(x_BTI, len(kernel_RIO), where)
    parts = jnp.split(x_BTI, where.splits, axis=1) if where.splits else [x_BTI]
    if where.rows_BS is None:
        done = [
            _product(x, kernel_RIO[row], bias_RO[row])
            for x, row in zip(parts, where.rows, strict=True)
        ]
    else:
        kernels, biases = jnp.stack(list(kernel_RIO)), jnp.stack(list(bias_RO))
        done = [
            by_example(x, _picked(kernels, row_B), _picked(biases, row_B))
            for x, row_B in zip(parts, where.rows_BS.T, strict=True)
        ]
    return done[0] if len(done) == 1 else jnp.concatenate(done, axis=1)


def by_example(x_BTI: Array, kernel_BIO: Array, bias_BO: Array) -> Array:
    """Every example times its own matrix plus its own bias, [B, T, O]."""
    return jnp.einsum("bti,bio->bto", x_BTI, kernel_BIO) + bias_BO[:, None]


def _product(x_BTI: Array, kernel_IO: Array, bias_O: Array) -> Array:
    # In two axes: the derivative of a product of three transposes what comes back, by a copy, which
    # on a CPU makes a segment's gradient half as dear again.
    batch, tokens, inputs = x_BTI.shape
    y_NO = x_BTI.reshape(batch * tokens, inputs) @ kernel_IO + bias_O
    return y_NO.reshape(batch, tokens, kernel_IO.shape[-1])


def _picked(rows_R: Array, row_B: Array) -> Array:
    # A product with one-hot rows picks exactly, and its derivative is no scatter. It costs R
    # multiplications for each entry of a matrix, which the T tokens of the example outweigh.
    hot_BR = jax.nn.one_hot(row_B, rows_R.shape[0], dtype=rows_R.dtype)
    return jnp.tensordot(hot_BR, rows_R, axes=1, precision=EXACT)


def _check(x_BTI: Array, rows: int, where: Segments) -> None:
    tokens, ends = x_BTI.shape[1], (0, *where.splits)
    if list(ends) != sorted(ends) or ends[-1] > tokens:
        raise ValueError(f"splits {where.splits} do not cut {tokens} tokens in ascending order")
    segments = len(where.rows) if where.rows_BS is None else where.rows_BS.shape[1]
    if segments != len(ends):
        raise ValueError(f"{len(ends)} segments, but rows for {segments} of them")
    if where.rows_BS is None and not all(0 <= row < rows for row in where.rows):
        raise ValueError(f"rows {where.rows} of {rows} mixtures")
