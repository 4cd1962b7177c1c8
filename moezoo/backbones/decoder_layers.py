"""The parts of a decoder: embedding, gated MLP, and the layer around attention and MLP."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.causal_attention import CausalAttention
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.kv_cache import KeyValues
from moezoo.nn.layers import Init, Linear, RMSNorm, normal
from moezoo.nn.rope import Rotation


class Embedding(nnx.Module):
    """One row of `table` [vocabulary, D] per token id."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        init: Init = normal,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.table = nnx.Param(init(rngs.params(), (vocabulary, width)).astype(param_dtype))
        self.dtype = dtype

    def __call__(self, tokens_BT: Array) -> Array:
        return self.table.get_value()[tokens_BT].astype(self.dtype)

    def logits(self, x: Array) -> Array:
        """The products of x [..., D] with all rows, for a tied head."""
        return x.astype(self.dtype) @ self.table.get_value().astype(self.dtype).T


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x): SwiGLU (Shazeer, arXiv:2002.05202, eq. 6)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "init": normal}
        self.gate: Any = Linear(width, hidden, bias=bias, rngs=rngs, **common)
        self.up: Any = Linear(width, hidden, bias=bias, rngs=rngs, **common)
        self.down: Any = Linear(hidden, width, bias=bias, rngs=rngs, **common)

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        gate = apply_linear(self.gate, x_BTD, context, "gate")
        up = apply_linear(self.up, x_BTD, context, "up")
        return apply_linear(self.down, jax.nn.silu(gate) * up, context, "down")


class Layer(nnx.Module):
    """Attention and a gated MLP, each behind a norm of its own and around a residual."""

    def __init__(self, attn: CausalAttention, mlp: GatedMLP, norm1: RMSNorm, norm2: RMSNorm):
        self.attn, self.mlp, self.norm1, self.norm2 = attn, mlp, norm1, norm2

    def __call__(
        self,
        x_BTD: Array,
        by: Rotation,
        seen_BTS: Array,
        context: Context,
        past: KeyValues | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """The layer's output and the keys and values it looked at; see `CausalAttention`."""
        inner = context.within("attn")
        y_BTD, kv = self.attn(self.norm1(x_BTD), by, seen_BTS, inner, past, slot)
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.norm2(x_BTD), context.within("mlp")), kv
