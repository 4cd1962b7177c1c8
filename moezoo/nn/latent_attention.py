"""Multi-head latent attention of DeepSeek: keys and values are made of one narrow latent per token.

DeepSeek-V2 (arXiv:2405.04434, section 2.1, eq. 9-19). Of a token the cache holds its latent and the
rotated part of its key, which all heads share, whatever the number of heads:

    c = norm(W_down x)        k_h = [W_k,h c ; rotated(W_r x)]        v_h = W_v,h c

Queries come of a latent of their own, or of the token. Positions turn a part of queries and keys
only, because the rest has to come from the latent without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Range, check
from moezoo.nn.causal_attention import KeyValues, attend
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.layers import Linear, RMSNorm, normal
from moezoo.nn.rope import Rotation, rotate, rotate_neighbours

NORM_EPSILON = 1e-6  # of latents' norms, whatever the other norms have, as published


@dataclass(frozen=True)
class LatentConfig:
    """Widths of latent attention; the defaults but for `rank` are DeepSeek-V3's."""

    rank: Annotated[int, Range(0, 2**24)] = 0
    """Width of the latent that keys and values are made of; 0: attention without latents."""
    query_rank: Annotated[int, Range(0, 2**24)] = 1536
    """Width of the latent that queries are made of; 0: they are made of the token."""
    plain: AxisSize = 128
    """Features of a head's query and key that do not turn."""
    rotated: AxisSize = 64
    """Features of a head's query and key that turn with the position; keys' are the same in all."""
    values: AxisSize = 128
    """Features of a head's value."""
    neighbours: bool = True
    """Whether the pairs that turn are features 2i and 2i + 1, not i and i + half."""
    growth: Annotated[float, Range(0, 1e3)] = 0.0
    """For longer texts: scores are multiplied by (0.1 growth ln(rope.factor) + 1)^2."""

    def __post_init__(self) -> None:
        check(self, "latent")
        if self.rotated < 4 or self.rotated % 2:
            raise UserError(
                f"latent.rotated is {self.rotated}; rotation needs an even width from 4 on."
            )

    @property
    def width_of_head(self) -> int:
        """Features of a head's query and key."""
        return self.plain + self.rotated

    def score_scale(self, factor: float) -> float:
        """What scores are multiplied by where texts are `factor` times longer than at first."""
        grown = 0.1 * self.growth * math.log(max(factor, 1.0)) + 1.0
        return self.width_of_head**-0.5 * grown * grown


class LatentAttention(nnx.Module):
    """Causal attention with products kv_down, kv_up, o, and q_down and q_up, or q.

    `kv_down` gives the latent and the shared part of the keys side by side, `kv_up` the rest of the
    key and the value of every head. `bias` for the products from tokens, `out_bias` for o.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        config: LatentConfig,
        *,
        scale: float,
        bias: bool = False,
        out_bias: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "init": normal}
        common |= {"rngs": rngs}
        inner, rank = heads * config.width_of_head, config.query_rank
        # Each set once: an attribute of a module cannot be None first and a module later.
        self.q: Any = None if rank else Linear(width, inner, bias=False, **common)
        self.q_down: Any = Linear(width, rank, bias=bias, **common) if rank else None
        self.q_down_norm = RMSNorm(rank, NORM_EPSILON, param_dtype) if rank else None
        self.q_up: Any = Linear(rank, inner, bias=False, **common) if rank else None
        self.kv_down: Any = Linear(width, config.rank + config.rotated, bias=bias, **common)
        self.kv_down_norm = RMSNorm(config.rank, NORM_EPSILON, param_dtype)
        both = heads * (config.plain + config.values)
        self.kv_up: Any = Linear(config.rank, both, bias=False, **common)
        self.o: Any = Linear(heads * config.values, width, bias=out_bias, **common)
        self.heads, self.config, self.scale = heads, config, scale

    def __call__(
        self,
        x_BTD: Array,
        by: Rotation,
        seen_BTS: Array,
        context: Context,
        past: KeyValues | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, KeyValues]:
        """As `CausalAttention`; what is kept are latents and the rotated part of keys."""
        config = self.config
        turn = rotate_neighbours if config.neighbours else rotate
        q = self._queries(x_BTD, context)
        turned = turn(q[..., config.plain :], by)
        q = jnp.concatenate([q[..., : config.plain], turned], axis=-1)
        down = apply_linear(self.kv_down, x_BTD, context, "kv_down")
        latent, shared = down[..., : config.rank], down[..., config.rank :]
        kept = KeyValues(self.kv_down_norm(latent)[:, :, None], turn(shared[:, :, None], by))
        if past is not None and slot is not None:
            kept = past.written(kept, slot)
            # The mask is one of these tokens, not of slots; nobody looks at padding's.
            context = replace(context, mask_BT=None)
        mixed = attend(q, self._expanded(kept, context), seen_BTS, self.scale)
        return apply_linear(self.o, mixed, context, "o"), kept

    def _queries(self, x_BTD: Array, context: Context) -> Array:
        """Not rotated yet, [B, T, H, plain + rotated]."""
        if self.q_down_norm is None:
            q = apply_linear(self.q, x_BTD, context, "q")
        else:
            down = apply_linear(self.q_down, x_BTD, context, "q_down")
            q = apply_linear(self.q_up, self.q_down_norm(down), context, "q_up")
        return q.reshape(*x_BTD.shape[:2], self.heads, -1)

    def _expanded(self, kept: KeyValues, context: Context) -> KeyValues:
        """The keys and values of every head."""
        latent_BSR, shared_BS1D = kept.keys_BSGD[:, :, 0], kept.values_BSGD
        both = apply_linear(self.kv_up, latent_BSR, context, "kv_up")
        both = both.reshape(*latent_BSR.shape[:2], self.heads, -1)
        shape = (*both.shape[:3], self.config.rotated)
        keys = [both[..., : self.config.plain], jnp.broadcast_to(shared_BS1D, shape)]
        return KeyValues(jnp.concatenate(keys, axis=-1), both[..., self.config.plain :])
