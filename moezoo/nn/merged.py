"""Linear maps that are mixed before the product: one dense matrix per condition row.

W(c) = sum_e g_e(c) W_e. With few rows of conditions (one task per batch row, or per batch) this is
as cheap as one dense layer, and a fixed condition folds into one. Uni-Perceiver-MoE
(arXiv:2206.04674), section 3.2.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.experts import Stack, check_sizes
from moezoo.nn.layers import Init, Linear, trunc_normal
from moezoo.nn.router import EXACT


class MergedLinear(Stack):
    """E linear maps, kernel [E, in, out] and bias [E, out], applied as one mixture per row."""

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

    def merge(self, weights_BE: Array) -> tuple[Array, Array]:
        """The mixtures' kernels [B, in, out] and biases [B, out] in float32."""
        weights_BE = weights_BE.astype(jnp.float32)
        kernel_EIO, bias_EO = self.kernel.get_value(), self.bias.get_value()
        kernel_BIO = jnp.einsum("be,eio->bio", weights_BE, kernel_EIO, precision=EXACT)
        return kernel_BIO, jnp.matmul(weights_BE, bias_EO, precision=EXACT)

    def __call__(self, x_BTD: Array, weights_BE: Array) -> Array:
        """x_BTD times its row's mixture, in `dtype`.

        weights_BE: float [B, E], or [1, E] for one mixture of the whole batch
        (`routing.dense_weights` of a decision with one token per row).
        """
        kernel_BIO, bias_BO = (a.astype(self.dtype) for a in self.merge(weights_BE))
        x_BTD = x_BTD.astype(self.dtype)
        if weights_BE.shape[0] == 1:
            return x_BTD @ kernel_BIO[0] + bias_BO[0]
        return jnp.einsum("bti,bio->bto", x_BTD, kernel_BIO) + bias_BO[:, None]

    def fold(self, weights_E: Array) -> Linear:
        """The dense layer that a fixed mixture is; exact in float32."""
        kernel_1IO, bias_1O = self.merge(jnp.asarray(weights_E)[None])
        inputs, outputs = kernel_1IO.shape[1:]
        dense = Linear(inputs, outputs, dtype=self.dtype, rngs=nnx.Rngs(0))
        dense.kernel.set_value(kernel_1IO[0])
        dense.bias.set_value(bias_1O[0])
        return dense
