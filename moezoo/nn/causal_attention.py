"""Grouped-query attention of every token to those that it may see.

Ainslie et al., "GQA" (arXiv:2305.13245): H query heads in G groups, each with one head of keys and
values. G = H is multi-head attention, G = 1 multi-query attention.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.attention import MakeNorm
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.kv_cache import KeyValues
from moezoo.nn.layers import Linear, normal
from moezoo.nn.rope import Rotation, rotate

NEVER = float(jnp.finfo(jnp.float32).min)


def attend(q_BTHD: Array, kv: KeyValues, seen_BTS: Array) -> Array:
    """Softmax attention, scores and softmax float32; the heads then side by side, [B, T, H * D].

    A token that sees nobody (padding) gets the mean of all values, no NaN.
    """
    batch, tokens, heads, width = q_BTHD.shape
    groups = kv.keys_BSGD.shape[2]
    q_BTGRD = q_BTHD.reshape(batch, tokens, groups, heads // groups, width)
    scores = jnp.einsum(
        "btgrd,bsgd->bgrts", q_BTGRD, kv.keys_BSGD, preferred_element_type=jnp.float32
    )
    scores = jnp.where(seen_BTS[:, None, None], scores * width**-0.5, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(kv.values_BSGD.dtype)
    mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, kv.values_BSGD)
    return mixed.reshape(batch, tokens, heads * width)


class CausalAttention(nnx.Module):
    """Rotary grouped-query attention with separate products q, k, v and o.

    `bias` for q, k and v, `out_bias` for o. `make_norm(head width)` gives a norm for queries and
    one for keys, before they are rotated (Qwen3). Raises UserError when `groups` does not divide
    `heads`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        groups: int,
        head_width: int,
        *,
        bias: bool = False,
        out_bias: bool = False,
        make_norm: MakeNorm | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if groups < 1 or heads % groups:
            raise UserError(f"{groups} heads of keys and values must divide the {heads} heads.")
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "init": normal}
        inner, shared = heads * head_width, groups * head_width
        self.q: Any = Linear(width, inner, bias=bias, rngs=rngs, **common)
        self.k: Any = Linear(width, shared, bias=bias, rngs=rngs, **common)
        self.v: Any = Linear(width, shared, bias=bias, rngs=rngs, **common)
        self.o: Any = Linear(inner, width, bias=out_bias, rngs=rngs, **common)
        self.q_norm = make_norm(head_width) if make_norm else None
        self.k_norm = make_norm(head_width) if make_norm else None
        self.head_width = head_width

    def __call__(
        self,
        x_BTD: Array,
        by: Rotation,
        seen_BTS: Array,
        context: Context,
        past: KeyValues | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """What attention adds to x, and the keys and values it looked at.

        by: the tokens' rotation. seen_BTS: bool, what each token sees among the tokens, or among
        the slots of `past`, into which the tokens go from `slot` on.
        """
        q, k, v = (
            self._heads(apply_linear(getattr(self, name), x_BTD, context, name)) for name in "qkv"
        )
        q = rotate(q if self.q_norm is None else self.q_norm(q), by)
        k = rotate(k if self.k_norm is None else self.k_norm(k), by)
        kv = KeyValues(k, v)
        if past is not None and slot is not None:
            kv = past.written(kv, slot)
        return apply_linear(self.o, attend(q, kv, seen_BTS), context, "o"), kv

    def _heads(self, x_BTD: Array) -> Array:
        return x_BTD.reshape(*x_BTD.shape[:2], -1, self.head_width)
