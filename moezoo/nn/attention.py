"""Multi-head self-attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.layers import Linear


class Attention(nnx.Module):
    """Softmax attention of every token to every token, one fused product for q, k and v.

    The outputs of `qkv` lie as (3, heads, head width), as in DeiT and timm. The scores are scaled
    by 1/sqrt(head width) and their softmax is float32.
    `head_width` is the width over the heads where it is not given. Raises UserError when `heads`
    does not divide `width`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_width: int | None = None,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise UserError(f"heads is {heads}; it must divide the width {width}.")
        inner = heads * (head_width or width // heads)
        self.qkv = Linear(width, 3 * inner, dtype=dtype, rngs=rngs)
        self.proj = Linear(inner, width, dtype=dtype, rngs=rngs)
        self.heads = heads

    def __call__(self, x_BTD: Array) -> Array:
        q, k, v = rearrange(self.qkv(x_BTD), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        scores_BHTT = jnp.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        weights_BHTT = jax.nn.softmax(scores_BHTT.astype(jnp.float32), axis=-1).astype(v.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights_BHTT, v)
        return self.proj(rearrange(mixed, "b h t d -> b t (h d)"))
