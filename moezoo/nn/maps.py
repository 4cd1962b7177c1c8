"""Experts on feature maps, their mixture and its routers: what multi-task decoders are made of.

An expert is a small stack of convolutions that sees a whole map. A router (an MLP on the pooled map
or on single places, a constant, or MLoRE's two branches) decides once per image, or once per place,
how the experts' maps are mixed. Every task mixes the same maps, so each expert runs once for all
tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.context import NO_TASK, Context
from moezoo.nn.conv import BatchNorm, Conv
from moezoo.nn.layers import LayerNorm, Linear, gelu
from moezoo.nn.routers import Decision, TopKRouter
from moezoo.ops.routing import (
    Noise,
    Noisy,
    Routing,
    Select,
    dense_weights,
    map_rows,
    no_noise,
    route,
    softmax_then_top_k,
)
from moezoo.ops.selection import check_learns


class MLPRouter(TopKRouter):
    """Two linear layers with GELU between them on each row, in float32.

    Rows are pooled maps (one decision per image) or places (one per place).
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        k: int,
        *,
        select: Select = softmax_then_top_k,
        rngs: nnx.Rngs,
    ):
        super().__init__(k, select, no_noise)
        self.fc1 = Linear(width, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, experts, rngs=rngs)

    def logits(self, x_ND: Array, context: Context) -> Array:
        # `Linear` has no precision of its own, and a router's products must be exact.
        with jax.default_matmul_precision("highest"):
            return self.fc2(gelu(self.fc1(x_ND.astype(jnp.float32))))


class ConstantRouter(TopKRouter):
    """The same learned logits for every row, whatever it holds; `bias` [E] starts at 0."""

    decision: ClassVar[Decision] = "constant"

    def __init__(self, experts: int, k: int, *, select: Select = softmax_then_top_k):
        super().__init__(k, select, no_noise)
        self.bias = nnx.Param(jnp.zeros((experts,)))

    def logits(self, x_ND: Array, context: Context) -> Array:
        bias = self.bias.get_value()
        return jnp.broadcast_to(bias, (x_ND.shape[0], bias.shape[0]))


class GridOutput(NamedTuple):
    """A decision per image, N = B, and `mix_B`, a further number per image without bounds."""

    routing: Routing
    mix_B: Array


class GridRouter(nnx.Module):
    """MLoRE's router: one decision per image from a map of a fixed grid, in float32.

    One branch describes places and averages them, the other weighs places (one number for each of
    the grid's, shared by channels) and describes the sum; both have a quarter of the width. They
    give E logits, E deviations of the noise that acts in training, and one mixing number. Yang et
    al., CVPR 2024 (arXiv:2403.17749), as in the published code. Raises UserError for a selection
    that could teach it nothing.
    """

    decision: ClassVar[Decision] = "row"
    depends_on_task: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        places: int,
        experts: int,
        k: int,
        *,
        select: Select = softmax_then_top_k,
        rngs: nnx.Rngs,
    ):
        check_learns(select, k)
        quarter = width // 4
        self.describe = Linear(width, quarter, rngs=rngs)
        self.norm = LayerNorm(quarter, epsilon=1e-5)  # PyTorch's, as published
        self.project = Linear(quarter, quarter, rngs=rngs)
        self.weigh = Linear(places, 1, rngs=rngs)
        self.norm_sum = LayerNorm(width, epsilon=1e-5)
        self.describe_sum = Linear(width, quarter, rngs=rngs)
        self.out = Linear(2 * quarter, 2 * experts + 1, rngs=rngs)
        self.experts, self.k, self.select = experts, k, select

    def features(self, x_BHWD: Array) -> Array:
        """What the decision is made from, float32 [B, D // 2]."""
        x_BPD = x_BHWD.reshape(x_BHWD.shape[0], -1, x_BHWD.shape[-1]).astype(jnp.float32)
        places_BPF = self.project(gelu(self.norm(self.describe(x_BPD))))
        sum_BD = self.weigh(jnp.swapaxes(x_BPD, 1, 2))[..., 0]
        sum_BF = self.describe_sum(gelu(self.norm_sum(sum_BD)))
        return jnp.concatenate([places_BPF.mean(axis=1), sum_BF], axis=-1)

    def __call__(
        self, x_BHWD: Array, context: Context = NO_TASK, key: Array | None = None
    ) -> GridOutput:
        with jax.default_matmul_precision("highest"):
            out_B = self.out(self.features(x_BHWD))
        logits_BE, scale_BE = out_B[:, : self.experts], out_B[:, self.experts : -1]
        noise = _scaled(scale_BE)
        routing = route(logits_BE, k=self.k, select=self.select, noise=noise, key=key)
        return GridOutput(routing, out_B[:, -1])


def _scaled(scale_NE: Array) -> Noise:
    def noise(logits_NE: Array, eps_NE: Array, allowed_N1: Array) -> Noisy:
        # The published layer gives deviations of either sign; only their size means something.
        return Noisy(logits_NE + scale_NE * eps_NE, jnp.abs(scale_NE))

    return noise


def pooled(x_BHWD: Array) -> Array:
    """The mean over places, float32 [B, D]."""
    return x_BHWD.astype(jnp.float32).mean(axis=(1, 2))


def placed(x_BHWD: Array) -> Array:
    """Every place a row, [B * H * W, D]."""
    return x_BHWD.reshape(-1, x_BHWD.shape[-1])


def joined(routings: list[Routing]) -> Routing:
    """The decisions of J tasks as one: row n * J + j is row n of task j's.

    In this order a batch that is split over devices stays where it is.
    """
    return map_rows(lambda *arrays: in_turn(arrays), *routings)


def in_turn(rows: Sequence[Array]) -> Array:
    """J arrays [N, ...] as one [N * J, ...], row n * J + j from array j."""
    return jnp.stack(rows, axis=1).reshape(-1, *rows[0].shape[1:])


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
    # Maps of a single place have as many places as images, and both shapes are the same.
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
