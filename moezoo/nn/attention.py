"""Multi-head self-attention, and attention pooling: from the tokens of an image to one vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.context import Context, LayerOutput, apply_linear
from moezoo.nn.layers import MLP, Activation, Init, LayerNorm, Linear, gelu, trunc_normal
from moezoo.ops.attention import AttentionWay, by_kernel, takes_kernel

MakeNorm = Callable[[int], Callable[[Array], Array]]  # head width -> module


class Attention(nnx.Module):
    """Softmax attention of every token to every token, one fused product for q, k and v.

    The outputs of `qkv` lie as (3, heads, head width), as in DeiT and timm. The scores are scaled
    by 1/sqrt(head width) and their softmax is float32. `head_width` is the width over the heads
    where it is not given. `make_norm(head width)` gives a norm for queries and one for keys,
    before the product (Dehghani et al., arXiv:2302.05442, section 2). `way`: by plain products or
    by a kernel (`ops.attention`).
    Raises UserError when `heads` does not divide `width`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        head_width: int | None = None,
        make_norm: MakeNorm | None = None,
        way: AttentionWay = "plain",
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise UserError(f"heads is {heads}; it must divide the width {width}.")
        head_width = head_width or width // heads
        inner = heads * head_width
        self.qkv: Any = Linear(width, 3 * inner, dtype=dtype, rngs=rngs)
        self.proj: Any = Linear(inner, width, dtype=dtype, rngs=rngs)
        self.heads = heads
        self.way: AttentionWay = way
        self.query_norm = make_norm(head_width) if make_norm else None
        self.key_norm = make_norm(head_width) if make_norm else None

    def __call__(self, x_BTD: Array) -> Array:
        return self.proj(self.mixed(x_BTD))

    def mixed(self, x_BTD: Array) -> Array:
        """What `proj` gets: the heads' outputs side by side."""
        q, k, v = rearrange(self.qkv(x_BTD), "b t (n h d) -> n b h t d", n=3, h=self.heads)
        q = q if self.query_norm is None else self.query_norm(q)
        k = k if self.key_norm is None else self.key_norm(k)
        return attend(q, k, v, way=self.way)


class SplitAttention(nnx.Module):
    """As `Attention` with a linear layer each for q, k and v, and o behind them.

    For weights and updates that tell them apart. Layers are handed the context.
    Raises UserError when `heads` does not divide `width`.
    """

    wants_context: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        bias: bool = True,
        way: AttentionWay = "plain",
        dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise UserError(f"heads is {heads}; it must divide the width {width}.")
        options: dict[str, Any] = {"dtype": dtype, "init": init, "rngs": rngs}
        self.q: Any = Linear(width, width, bias=bias, **options)
        self.k: Any = Linear(width, width, bias=bias, **options)
        self.v: Any = Linear(width, width, bias=bias, **options)
        self.o: Any = Linear(width, width, **options)
        self.heads = heads
        self.way: AttentionWay = way

    def __call__(self, x_BTD: Array, context: Context) -> LayerOutput:
        mixed_BTD = self.mixed(x_BTD, context)
        return LayerOutput(apply_linear(self.o, mixed_BTD, context, "o"))

    def mixed(self, x_BTD: Array, context: Context) -> Array:
        """What `o` gets: the heads' outputs side by side, [B, T, D]."""
        q, k, v = (
            rearrange(
                apply_linear(getattr(self, name), x_BTD, context, name),
                "b t (h d) -> b h t d",
                h=self.heads,
            )
            for name in ("q", "k", "v")
        )
        return attend(q, k, v, way=self.way)


def attend(
    q_BHTD: Array,
    k_BHTD: Array,
    v_BHTD: Array,
    bias_BHTT: Array | None = None,
    *,
    way: AttentionWay = "plain",
) -> Array:
    """Softmax attention in every head, the heads then side by side: [B, T, H * D].

    bias_BHTT: float32, added to the scaled scores, by plain products only; axes of size 1 are for
    all.
    """
    given = q_BHTD, k_BHTD, v_BHTD
    # A kernel would round a bias to 16 bits, and its derivative is not that of every form of one.
    if bias_BHTT is None and takes_kernel(way, *(_heads_last(a) for a in given)):
        q, k, v = (jnp.swapaxes(a, 1, 2) for a in given)
        return by_kernel(q, k, v)
    scores_BHTT = jnp.einsum("bhqd,bhkd->bhqk", q_BHTD, k_BHTD, preferred_element_type=jnp.float32)
    # Scaled in float32: a score that was rounded to the model's type before would be so twice.
    scores_BHTT = scores_BHTT * q_BHTD.shape[-1] ** -0.5
    scores_BHTT = scores_BHTT if bias_BHTT is None else scores_BHTT + bias_BHTT
    weights_BHTT = jax.nn.softmax(scores_BHTT, axis=-1)
    # Back to v's type: the second product runs in the model's type, as the first does.
    weights_BHTT = weights_BHTT.astype(v_BHTD.dtype)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights_BHTT, v_BHTD)
    return rearrange(mixed, "b h t d -> b t (h d)")


def _heads_last(a_BHTD: Array) -> jax.ShapeDtypeStruct:
    """The form of [B, T, H, D]."""
    b, h, t, d = a_BHTD.shape
    return jax.ShapeDtypeStruct((b, t, h, d), a_BHTD.dtype)


def first_token(x_BTD: Array) -> Array:
    """The class token, [B, D]."""
    return x_BTD[:, 0]


def mean_token(x_BTD: Array, mask_BT: Array | None = None) -> Array:
    """The mean of all tokens, [B, D]; mask_BT: bool, False = left out, whatever stands there."""
    # bfloat16 would lose tokens in a sum of hundreds.
    wide = x_BTD.astype(jnp.float32)
    if mask_BT is None:
        return jnp.mean(wide, axis=1).astype(x_BTD.dtype)
    total_BD = jnp.sum(jnp.where(mask_BT[..., None], wide, 0.0), axis=1)
    # At least 1: a row of padding alone gives 0.
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
