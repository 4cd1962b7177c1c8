"""Grouped-query attention of a decoder: what each token may see, and the cache of what it has seen.

Ainslie et al., "GQA" (arXiv:2305.13245): H query heads in G groups, each with one head of keys and
values. G = H is multi-head attention, G = 1 multi-query attention.

Padding and packing decide which tokens see each other and where in its document each one stands; a
cache keeps the keys and values of earlier tokens in slots.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.attention import MakeNorm
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.layers import Linear, normal
from moezoo.nn.rope import Rotation, rotate
from moezoo.ops.attention import AttentionWay, by_kernel, takes_kernel

NormOver = Literal["head", "width"]


def visible(mask_BT: Array | None, segments_BT: Array | None, batch: int, tokens: int) -> Array:
    """Which tokens (last axis) each token sees: itself and those before it; bool [B, T, T].

    mask_BT: bool, False = padding, which nobody sees. segments_BT: int, documents packed into one
    row; tokens see their own document only.
    """
    seen_BTT = jnp.broadcast_to(jnp.tri(tokens, dtype=bool), (batch, tokens, tokens))
    if mask_BT is not None:
        seen_BTT &= mask_BT[:, None, :]
    if segments_BT is not None:
        seen_BTT &= segments_BT[:, :, None] == segments_BT[:, None, :]
    return seen_BTT


def positions(
    mask_BT: Array, segments_BT: Array | None = None, before_B: Array | None = None
) -> Array:
    """The number of tokens before each one in its document, int32 [B, T]; 0 for padding in front.

    before_B: tokens of the row that earlier calls have seen.
    """
    count_BT = jnp.cumsum(mask_BT, axis=1, dtype=jnp.int32) - 1
    if segments_BT is not None:
        # One less in front, so that the first token begins a segment, whatever its number.
        fresh_BT = jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0
        # What the count was where the current segment began; counts never decrease.
        count_BT -= jax.lax.cummax(jnp.where(fresh_BT, count_BT, 0), axis=1)
    if before_B is not None:
        count_BT += before_B[:, None]
    return jnp.maximum(count_BT, 0)


class KeyValues(NamedTuple):
    """Rotated keys and values of one layer, [B, S, G, D] for S tokens or slots.

    Of latent attention what both are made of: latents, and the keys' rotated part, G = 1.
    """

    keys_BSGD: Array
    values_BSGD: Array

    def written(self, new: KeyValues, slot: Array) -> KeyValues:
        """With the tokens of `new` from `slot` on."""
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, fresh.astype(old.dtype), slot, axis=1)
            for old, fresh in zip(self, new, strict=True)
        )
        return KeyValues(keys, values)


class Cache(NamedTuple):
    """The keys and values of every layer, and which slots hold a token.

    All rows fill the same slots in step, so that one update serves the batch; a row that has
    padding in a slot never looks there.

    layers: one entry per layer.   valid_BS: bool, False = empty slot or padding.
    used: int32 scalar, slots filled so far.
    """

    layers: tuple[KeyValues, ...]
    valid_BS: Array
    used: Array

    @classmethod
    def empty(
        cls,
        layers: int,
        batch: int,
        slots: int,
        keys: tuple[int, int],
        values: tuple[int, int],
        dtype: Any,
    ) -> Self:
        """Room for `slots` tokens per row, padding included; keys, values: groups and width."""

        def room(sizes: tuple[int, int]) -> Array:
            return jnp.zeros((batch, slots, *sizes), dtype)

        pairs = (KeyValues(room(keys), room(values)) for _ in range(layers))
        return cls(tuple(pairs), jnp.zeros((batch, slots), bool), jnp.zeros((), jnp.int32))

    @property
    def lengths_B(self) -> Array:
        """Tokens seen per row, padding not counted: the next token's position, int32."""
        return self.valid_BS.sum(-1, dtype=jnp.int32)

    def reserved(self, mask_BT: Array) -> Self:
        """With the next slots taken for tokens [B, T], whose padding stays invalid.

        Their keys and values follow layer by layer.
        """
        valid_BS = jax.lax.dynamic_update_slice_in_dim(self.valid_BS, mask_BT, self.used, axis=1)
        return self._replace(valid_BS=valid_BS, used=self.used + mask_BT.shape[1])

    def visible(self, tokens: int) -> Array:
        """Which slots each of the last `tokens` reserved ones sees, bool [B, T, S]."""
        slot_S = jnp.arange(self.valid_BS.shape[1])
        own_T = self.used - tokens + jnp.arange(tokens)
        return (slot_S <= own_T[:, None]) & self.valid_BS[:, None, :]


# Finite: a row of -inf alone would be NaN after the softmax.
NEVER = float(jnp.finfo(jnp.float32).min)


def attend(
    q_BTHD: Array,
    kv: KeyValues,
    seen_BTS: Array,
    scale: float | None = None,
    *,
    way: AttentionWay = "plain",
) -> Array:
    """Softmax attention, scores and softmax float32; the heads then side by side, [B, T, H * D].

    scale: of the scores, 1/sqrt(width of a query) where it is not given. Values may be of another
    width than keys. A token that sees nobody (padding) gets the mean of all values, no NaN.
    """
    if takes_kernel(way, q_BTHD, *kv, seen_BTS):
        return by_kernel(q_BTHD, *kv, seen_BTS, scale)
    batch, tokens, heads, width = q_BTHD.shape
    groups = kv.keys_BSGD.shape[2]
    # Queries by group, instead of keys and values repeated for every head.
    q_BTGRD = q_BTHD.reshape(batch, tokens, groups, heads // groups, width)
    scores = jnp.einsum(
        "btgrd,bsgd->bgrts", q_BTGRD, kv.keys_BSGD, preferred_element_type=jnp.float32
    )
    # Scaled after the product, in float32: a scaled query would be rounded to its type.
    factor = width**-0.5 if scale is None else scale
    scores = jnp.where(seen_BTS[:, None, None], scores * factor, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(kv.values_BSGD.dtype)
    mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, kv.values_BSGD)
    return mixed.reshape(batch, tokens, -1)


class CausalAttention(nnx.Module):
    """Rotary grouped-query attention with separate products q, k, v and o.

    `bias` for q, k and v, `out_bias` for o. `make_norm(width)` gives a norm for queries and one for
    keys, before they are rotated: over each "head" by itself (Qwen3), or over the "width" of all
    heads together (OLMoE). `way`: by plain products or by a kernel (`ops.attention`).
    Raises UserError when `groups` does not divide `heads`.
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
        norm_over: NormOver = "head",
        way: AttentionWay = "plain",
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
        normed = {"head": (head_width, head_width), "width": (inner, shared)}[norm_over]
        self.q_norm = make_norm(normed[0]) if make_norm else None
        self.k_norm = make_norm(normed[1]) if make_norm else None
        self.head_width, self.norm_over = head_width, norm_over
        self.way: AttentionWay = way

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
        q, k, v = (apply_linear(getattr(self, name), x_BTD, context, name) for name in "qkv")
        q = rotate(self._normed(q, self.q_norm), by)
        # Rotated before they are kept: a token's position stays the same.
        kv = KeyValues(rotate(self._normed(k, self.k_norm), by), self._heads(v))
        if past is not None and slot is not None:
            kv = past.written(kv, slot)
        return apply_linear(self.o, attend(q, kv, seen_BTS, way=self.way), context, "o"), kv

    def _normed(self, x_BTD: Array, norm: Any) -> Array:
        """Heads [B, T, H, D] with the norm on each of them, or first on all."""
        if norm is None:
            return self._heads(x_BTD)
        whole = self.norm_over == "width"
        return self._heads(norm(x_BTD)) if whole else norm(self._heads(x_BTD))

    def _heads(self, x_BTD: Array) -> Array:
        return x_BTD.reshape(*x_BTD.shape[:2], -1, self.head_width)
