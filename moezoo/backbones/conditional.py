"""Transformer blocks whose linear maps are mixtures that a condition decides about.

Pre-norm attention and MLP, exact GELU, layer scale, stochastic depth. In a conditional block the
fused qkv and the output of attention share one decision; the two layers of the MLP share another
one, or have one each. Uni-Perceiver-MoE (arXiv:2206.04674), as in its published code. Dense blocks,
and those whose decisions are made for good, are the same modules without levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from moezoo.nn.causal_attention import KeyValues, attend
from moezoo.nn.conditional import Level, MergedLinear, decide
from moezoo.nn.context import Context
from moezoo.nn.layers import Init, LayerNorm, Linear, drop_path, gelu


class MakeMaps(Protocol):
    """What the four linear maps of a block are made of."""

    def level(self, rngs: nnx.Rngs) -> Any:
        """A fresh `Level`, or None: nothing is to be decided."""
        ...

    def layer(self, level: Any, inputs: int, outputs: int, maps: int, rngs: nnx.Rngs) -> Any:
        """A layer for the decisions of `level`; its outputs are `maps` maps side by side."""
        ...


def xavier(maps: int) -> Init:
    """Uniform with the variance 2 / (in + out), of each of `maps` maps that lie side by side."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        # By the outputs of one map: the published code starts fused q, k and v as three.
        bound = (6.0 / (shape[-2] + shape[-1] / maps)) ** 0.5
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    return init


class DenseMake:
    """Plain linear layers."""

    def __init__(self, dtype: Any = jnp.float32):
        self.dtype = dtype

    def level(self, rngs: nnx.Rngs) -> None:
        """None: there is nothing to decide."""

    def layer(self, level: None, inputs: int, outputs: int, maps: int, rngs: nnx.Rngs) -> Linear:
        """One linear layer."""
        return Linear(inputs, outputs, dtype=self.dtype, init=xavier(maps), rngs=rngs)


class MakeLevel(Protocol):
    """A fresh level."""

    def __call__(self, rngs: nnx.Rngs) -> Level: ...


class ConditionalMake:
    """`experts` linear maps in the place of each one, which a level decides about."""

    def __init__(self, make_level: MakeLevel, experts: int, dtype: Any = jnp.float32):
        self.make_level, self.experts, self.dtype = make_level, experts, dtype

    def level(self, rngs: nnx.Rngs) -> Level:
        """A fresh level."""
        return self.make_level(rngs)

    def layer(
        self, level: Level, inputs: int, outputs: int, maps: int, rngs: nnx.Rngs
    ) -> nnx.Module:
        """A layer of stacked maps; experts start different from each other."""
        sizes = (self.experts, inputs, outputs)
        stack = MergedLinear(*sizes, dtype=self.dtype, init=xavier(maps), rngs=rngs)
        return level.layer(stack)


class LayerScale(nnx.Module):
    """A learned factor per feature of a residual branch (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, width: int, start: float):
        self.scale = nnx.Param(jnp.full((width,), start))

    def __call__(self, x: Array) -> Array:
        return x * self.scale.get_value().astype(x.dtype)


class ConditionalAttention(nnx.Module):
    """Multi-head attention; one decision for qkv and output. qkv lies as (3, heads, head width)."""

    def __init__(self, width: int, heads: int, make: MakeMaps, *, rngs: nnx.Rngs):
        self.level = make.level(rngs)
        self.qkv = make.layer(self.level, width, 3 * width, 3, rngs)
        self.proj = make.layer(self.level, width, width, 1, rngs)
        self.heads = heads

    def __call__(
        self,
        x_BTD: Array,
        context: Context,
        seen_BTS: Array,
        key: Array | None = None,
        past: KeyValues | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """What attention adds to x, and the keys and values that it looked at.

        seen_BTS: bool, what each token sees among the tokens, or among the slots of `past`, into
        which the tokens go from `slot` on.
        """
        decision = decide(self.level, x_BTD, context.within("level"), key)
        qkv = decision(self.qkv, x_BTD)
        q, k, v = rearrange(qkv, "b t (n h d) -> n b t h d", n=3, h=self.heads)
        # The decoder's attention, because captions are made from a cache like its.
        kv = KeyValues(k, v)
        if past is not None and slot is not None:
            kv = past.written(kv, slot)
        return decision(self.proj, attend(q, kv, seen_BTS)), kv


class ConditionalMLP(nnx.Module):
    """Two layers with GELU between them; one decision for both, or with `make2` one each."""

    def __init__(
        self,
        width: int,
        hidden: int,
        make: MakeMaps,
        make2: MakeMaps | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.level = make.level(rngs)
        self.level2 = None if make2 is None else make2.level(rngs)
        self.fc1 = make.layer(self.level, width, hidden, 1, rngs)
        own = self.level if make2 is None else self.level2
        self.fc2 = (make2 or make).layer(own, hidden, width, 1, rngs)

    def __call__(self, x_BTD: Array, context: Context, key: Array | None = None) -> Array:
        """Both layers; a second decision sees what the first one saw, not the hidden units."""
        first = second = decide(self.level, x_BTD, context.within("level"), fold(key, 0))
        if self.level2 is not None:
            second = decide(self.level2, x_BTD, context.within("level2"), fold(key, 1))
        return second(self.fc2, gelu(first(self.fc1, x_BTD)))


class ConditionalBlock(nnx.Module):
    """x + scale1 * attention(norm1(x)), then x + scale2 * MLP(norm2(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        make: MakeMaps,
        *,
        make2: MakeMaps | None = None,
        layer_scale: float = 1e-3,
        drop_path: float = 0.0,
        epsilon: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.norm1, self.norm2 = (LayerNorm(width, epsilon) for _ in range(2))
        self.attn = ConditionalAttention(width, heads, make, rngs=rngs)
        self.mlp = ConditionalMLP(width, hidden, make, make2, rngs=rngs)
        self.scale1, self.scale2 = (LayerScale(width, layer_scale) for _ in range(2))
        self.drop_path = drop_path

    def __call__(
        self,
        x_BTD: Array,
        context: Context,
        seen_BTS: Array,
        key: Array | None = None,
        past: KeyValues | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """The tokens behind the block, and the keys and values of its attention."""
        y_BTD, kv = self.attn(
            self.norm1(x_BTD), context.within("attn"), seen_BTS, fold(key, 0), past, slot
        )
        x_BTD += drop_path(self.scale1(y_BTD), self.drop_path, fold(key, 1))
        y_BTD = self.mlp(self.norm2(x_BTD), context.within("mlp"), fold(key, 2))
        return x_BTD + drop_path(self.scale2(y_BTD), self.drop_path, fold(key, 3)), kv


class EncodedTokens(NamedTuple):
    """Tokens behind the last norm and map, [B, T, D], and every block's keys and values."""

    x_BTD: Array
    kept: tuple[KeyValues, ...]


class ConditionalEncoder(nnx.Module):
    """Blocks one after the other, a last norm, and the map `projection` where there is one.

    Block i of n is left out with probability `drop_path` * i / (n - 1) in training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        makes: Sequence[tuple[MakeMaps, MakeMaps | None]],
        *,
        layer_scale: float = 1e-3,
        drop_path: float = 0.0,
        epsilon: float = 1e-6,
        projection: Linear | None = None,
        rngs: nnx.Rngs,
    ):
        # A single block is never left out.
        last = max(len(makes) - 1, 1)
        self.blocks = nnx.List(
            ConditionalBlock(
                width,
                heads,
                hidden,
                make,
                make2=make2,
                layer_scale=layer_scale,
                drop_path=drop_path * i / last,
                epsilon=epsilon,
                rngs=rngs,
            )
            for i, (make, make2) in enumerate(makes)
        )
        self.norm = LayerNorm(width, epsilon)
        self.projection: Any = projection

    def __call__(
        self,
        x_BTD: Array,
        context: Context,
        seen_BTS: Array,
        key: Array | None = None,
        past: Sequence[KeyValues] | None = None,
        slot: Array | None = None,
    ) -> EncodedTokens:
        """`seen_BTS`, `past` and `slot` as in `ConditionalAttention`; `key` only in training."""
        kept = []
        for i, block in enumerate(self.blocks):
            here = context.within(f"blocks/{i}")
            own = None if past is None else past[i]
            x_BTD, kv = block(x_BTD, here, seen_BTS, fold(key, i), own, slot)
            kept.append(kv)
        x_BTD = self.norm(x_BTD)
        done_BTD = x_BTD if self.projection is None else self.projection(x_BTD)
        return EncodedTokens(done_BTD, tuple(kept))


def fold(key: Array | None, number: int) -> Array | None:
    """A key of its own for part `number`; None stays None."""
    return None if key is None else jax.random.fold_in(key, number)
