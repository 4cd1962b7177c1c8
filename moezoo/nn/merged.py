"""Linear maps that are mixed before the product: one dense matrix per condition row.

W(c) = sum_e g_e(c) W_e. With few rows of conditions (one or two per batch) this is as cheap as one
dense layer, and a fixed condition folds into one. Uni-Perceiver-MoE (arXiv:2206.04674), section
3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.experts import Stack, check_sizes
from moezoo.nn.layers import Init, Linear, trunc_normal
from moezoo.ops import merged
from moezoo.ops.expert import ExpertFn, Params
from moezoo.ops.expert import Linear as Multiply
from moezoo.ops.merged import WHOLE, Segments

ALL = slice(None)


def linear_map(params: Params, x: Array, linear: Multiply) -> Array:
    """One expert that is a linear map with a bias."""
    return linear(x, params["kernel"], params["bias"])


class MergedLinear(Stack):
    """E linear maps, kernel [E, in, out] and bias [E, out], applied as one mixture per row.

    They are `Experts` as well: a `MoE` can send each token to its own.
    """

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        *,
        dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        check_sizes(experts, outputs)
        super().__init__(dtype)
        self.kernel = nnx.Param(init(rngs.params(), (experts, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((experts, outputs)))

    @property
    def fn(self) -> ExpertFn:
        return linear_map

    def merge(self, weights_RE: Array, part: slice = ALL) -> tuple[Array, Array]:
        """The mixtures' kernels [R, in, out] and biases [R, out] in float32.

        part: the outputs that are wanted, such as those of the queries in a fused qkv; only they
        are merged.
        """
        kernel_EIO, bias_EO = self.kernel.get_value(), self.bias.get_value()
        return (
            merged.merge(kernel_EIO[..., part], weights_RE),
            merged.merge(bias_EO[..., part], weights_RE),
        )

    def __call__(
        self,
        x_BTD: Array,
        weights_RE: Array,
        where: Segments | None = None,
        part: slice = ALL,
    ) -> Array:
        """x_BTD times the mixture of each token's row, in `dtype`.

        weights_RE: float [R, E] (`routing.dense_weights` of a decision with one token per row).
        where: the row of each token; without it one row is everybody's, and B rows are those of
        the B examples. part: the outputs that are wanted.
        """
        kernel_RIO, bias_RO = (a.astype(self.dtype) for a in self.merge(weights_RE, part))
        x_BTD = x_BTD.astype(self.dtype)
        if where is None and weights_RE.shape[0] > 1:
            return merged.by_example(x_BTD, kernel_RIO, bias_RO)
        return merged.by_segment(x_BTD, kernel_RIO, bias_RO, where or WHOLE)

    def fold(self, weights_E: Array) -> Linear:
        """The dense layer that a fixed mixture is; exact in float32."""
        return self.folds(jnp.asarray(weights_E)[None])[0]

    def folds(self, weights_RE: Array) -> list[Linear]:
        """The dense layers of R fixed mixtures, merged together as a forward pass merges them."""
        kernel_RIO, bias_RO = self.merge(weights_RE)
        return [_dense(*row, self.dtype) for row in zip(kernel_RIO, bias_RO, strict=True)]


class LinearByRow(nnx.Module):
    """R dense linear maps, of which each token takes that of its row: R fixed mixtures.

    Lies in `rows/0`, `rows/1`, ...; they are all of one size.
    """

    def __init__(self, rows: Sequence[Linear]):
        self.rows = nnx.List(rows)

    def __call__(self, x_BTI: Array, where: Segments = WHOLE) -> Array:
        """x_BTI times each token's matrix, in the type of the layers."""
        dtype = self.rows[0].dtype
        kernels = [row.kernel.get_value().astype(dtype) for row in self.rows]
        biases = [row.bias.get_value().astype(dtype) for row in self.rows]
        return merged.by_segment(x_BTI.astype(dtype), kernels, biases, where)


def _dense(kernel_IO: Array, bias_O: Array, dtype: Any) -> Linear:
    inputs, outputs = kernel_IO.shape
    made = Linear(inputs, outputs, dtype=dtype, init=lambda *_: kernel_IO, rngs=nnx.Rngs(0))
    made.bias.set_value(bias_O)
    return made
