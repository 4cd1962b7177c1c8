"""From the tokens of an image to one vector."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from moezoo.nn.attention import MakeNorm, attend
from moezoo.nn.layers import MLP, Activation, LayerNorm, Linear, gelu, trunc_normal


def first_token(x_BTD: Array) -> Array:
    """The class token, [B, D]."""
    return x_BTD[:, 0]


def mean_token(x_BTD: Array, mask_BT: Array | None = None) -> Array:
    """The mean of all tokens, [B, D]; mask_BT: bool, False = left out, whatever stands there."""
    wide = x_BTD.astype(jnp.float32)
    if mask_BT is None:
        return jnp.mean(wide, axis=1).astype(x_BTD.dtype)
    total_BD = jnp.sum(jnp.where(mask_BT[..., None], wide, 0.0), axis=1)
    return (total_BD / jnp.maximum(mask_BT.sum(1), 1)[:, None]).astype(x_BTD.dtype)


class AttentionPool(nnx.Module):
    """A learned probe attends to all tokens, an MLP follows around a residual; [B, D].

    Multi-head attention pooling (Zhai et al., arXiv:2106.04560, section 3.5).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        *,
        activation: Activation = gelu,
        make_norm: MakeNorm | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.probe = nnx.Param(trunc_normal(rngs.params(), (1, 1, width)))
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key_value = Linear(width, 2 * width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.query_norm = make_norm(width // heads) if make_norm else None
        self.key_norm = make_norm(width // heads) if make_norm else None
        self.norm = LayerNorm(width)
        self.mlp = MLP(width, hidden, activation=activation, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x_BTD: Array) -> Array:
        probe = jnp.broadcast_to(self.probe.get_value(), (x_BTD.shape[0], 1, x_BTD.shape[2]))
        q = rearrange(self.query(probe), "b t (h d) -> b h t d", h=self.heads)
        k, v = rearrange(self.key_value(x_BTD), "b t (n h d) -> n b h t d", n=2, h=self.heads)
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        pooled_BTD = self.proj(attend(q, k, v))
        return (pooled_BTD + self.mlp(self.norm(pooled_BTD)))[:, 0]
