"""Experts on feature maps, and their mixture: what multi-task decoders are made of.

An expert here is a small stack of convolutions that sees a whole map. A router decides once per
image, or once per place, how the experts' maps are mixed; since every task mixes the same maps,
each expert runs once for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.conv import BatchNorm, Conv
from moezoo.nn.layers import gelu
from moezoo.ops.routing import Routing, dense_weights


class ConvExpert(nnx.Module):
    """1x1 convolution, 3x3 convolution, batch norm, GELU, 1x1 convolution: inputs -> width."""

    def __init__(self, inputs: int, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.proj = Conv(inputs, width, 1, dtype=dtype, rngs=rngs)
        self.conv = Conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(width)
        self.out = Conv(width, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        return self.out(gelu(self.norm(self.conv(self.proj(x_BHWC)), train)))


class LowRankConv(nnx.Module):
    """3x3 convolution to `rank` channels and a 1x1 convolution back: a 3x3 kernel of that rank."""

    def __init__(self, width: int, rank: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        if rank < 1:
            raise UserError(f"An expert of rank {rank}: ranks must be at least 1.")
        self.down = Conv(width, rank, 3, dtype=dtype, rngs=rngs)
        self.up = Conv(rank, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        return self.up(self.down(x_BHWC))


class MapExperts(nnx.Module):
    """Experts one after the other; they may differ in size, so they are not stacked."""

    def __init__(self, experts: list[nnx.Module]):
        self.experts = nnx.List(experts)

    @property
    def count(self) -> int:
        """E."""
        return len(self.experts)

    def __call__(self, x_BHWC: Array, train: bool = False) -> tuple[Array, ...]:
        """Every expert's map, E times [B, H, W, D]."""
        return tuple(expert(x_BHWC, train) for expert in self.experts)


def mixture(maps: tuple[Array, ...], routing: Routing) -> Array:
    """sum over e of weight_e times map e, [B, H, W, D] in the type of the maps.

    routing: of N = B rows, one decision per image, or of N = B * H * W, one per place.
    """
    batch, height, width, _ = maps[0].shape
    weights_NE = dense_weights(routing, len(maps))
    images = routing.mask_N.shape[0] == batch
    shape = (batch, 1, 1, -1) if images else (batch, height, width, -1)
    weights_BHWE = weights_NE.reshape(shape)
    # One multiply-add per expert: stacked maps would be kept in memory as [E, B, H, W, D].
    total = jnp.zeros(maps[0].shape, jnp.float32)
    for e, y_BHWD in enumerate(maps):
        total += weights_BHWE[..., e, None] * y_BHWD
    return total.astype(maps[0].dtype)


MakeExpert = Callable[[int, nnx.Rngs], nnx.Module]


def map_experts(count: int, make: MakeExpert, rngs: nnx.Rngs) -> MapExperts:
    """`count` experts made by `make(index, rngs)`; raises UserError for fewer than one."""
    if count < 1:
        raise UserError(f"{count} experts: a mixture needs at least 1.")
    return MapExperts([make(i, rngs) for i in range(count)])
