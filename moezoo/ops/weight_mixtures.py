"""Mixtures that cost one dense product: linear maps mixed before it, small MLPs side by side in it.

`by_segment` and what it needs: W(c) = sum_e g_e(c) W_e once per row of a condition, then one dense
product per token, with the mixture that the token's segment is under.

`side_by_side`: E small MLPs on the same tokens as one that is E times as wide,

    sum_e g_e (U_e f(D_e x + c_e) + d_e)
        = [U_1 ... U_E] (g * f([D_1 ... D_E] x + c)) + sum_e g_e d_e,

every gate repeated for the hidden units of its expert: two matrix products, and no output of a
single expert is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.exact import EXACT
from moezoo.ops.expert import Params


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
    # Once per row of a condition, not per token: exact products of parameters cost little.
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


class Wide(NamedTuple):
    """E bottlenecks of b hidden units as one; down_DR with R = E * b, out_bias_ED still apart."""

    down_DR: Array
    bias_R: Array
    up_RD: Array
    out_bias_ED: Array


def side_by_side(params: Params) -> Wide:
    """The parameters of `MLPExperts`, fc1 [E, D, b] and fc2 [E, b, D], as those of one."""
    down_EDb, up_EbD = params["fc1"]["kernel"], params["fc2"]["kernel"]
    experts, width, hidden = down_EDb.shape
    down_DR = jnp.swapaxes(down_EDb, 0, 1).reshape(width, experts * hidden)
    bias_R = params["fc1"]["bias"].reshape(-1)
    return Wide(down_DR, bias_R, up_EbD.reshape(experts * hidden, -1), params["fc2"]["bias"])


def mixed(
    params: Params, x_ND: Array, gates_NE: Array, activation: Callable[[Array], Array]
) -> Array:
    """All experts on all tokens, weighted and added; [N, D] in the type of x."""
    wide = side_by_side(params)
    gates_NE = gates_NE.astype(x_ND.dtype)
    n, e = gates_NE.shape
    hidden_NEb = activation(x_ND @ wide.down_DR + wide.bias_R).reshape(n, e, -1)
    gated_NR = (hidden_NEb * gates_NE[..., None]).reshape(n, wide.up_RD.shape[0])
    # Biases behind the experts are gated, too: they are part of what an expert gives.
    return gated_NR @ wide.up_RD + gates_NE @ wide.out_bias_ED


def folded(params: Params, gates_E: Array) -> Wide:
    """One bottleneck that is the mixture under constant gates, exactly; out_bias_ED is [1, D]."""
    wide = side_by_side(params)
    hidden = wide.up_RD.shape[0] // gates_E.shape[0]
    # Behind the activation, through which no factor could be moved.
    up_RD = wide.up_RD * jnp.repeat(gates_E, hidden)[:, None]
    out_bias_1D = jnp.sum(gates_E[:, None] * wide.out_bias_ED, axis=0, keepdims=True)
    return wide._replace(up_RD=up_RD, out_bias_ED=out_bias_1D)
