"""Swin transformers: attention inside windows that shift from block to block, on four levels.

Liu et al., "Swin Transformer" (arXiv:2103.14030). A stage is a few pre-norm blocks on one grid;
between stages the features of 2 x 2 places become one place of twice the width (patch merging), so
that the stages' outputs are maps of a pyramid. The sub-module names are timm's, by stage.

In every second block windows are moved by half their side. The map is rolled for that, so a window
at its border holds places from opposite sides, which a mask keeps apart. Where is not told by
positions but by a learned bias on the scores, one for each offset within a window and each head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Range, Ratio, Share, check
from moezoo.nn.attention import attend
from moezoo.nn.embed import PatchEmbed, grid_of
from moezoo.nn.layers import MLP, LayerNorm, Linear, drop_path, trunc_normal

EPSILON = 1e-5  # of every norm, as published
# Added to scores of places that only rolling made neighbours: their weights are 0 in float32.
APART = -100.0
Sizes = tuple[Annotated[int, Range(1, 2**16)], ...]


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin transformer; the defaults are Swin-T's."""

    width: AxisSize = 96
    """Features of a place in the first stage; each stage has twice the width of the one before."""
    depths: Sizes = (2, 2, 6, 2)
    """Blocks of each stage."""
    heads: Sizes = (3, 6, 12, 24)
    """Attention heads of each stage."""
    patch: AxisSize = 4
    """Side of the square of pixels that becomes one place of the first stage."""
    window: AxisSize = 7
    """Side of the square of places that see each other; a stage with a smaller grid has smaller
    ones."""
    mlp_ratio: Ratio = 4.0
    """Hidden width of a block's MLP over its width."""
    drop_path: Share = 0.0
    """Stochastic depth of the last block; grows linearly from 0 at the first."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and normalisations stay float32."""

    def __post_init__(self) -> None:
        check(self)
        if not self.depths or len(self.depths) != len(self.heads):
            raise UserError(
                f"depths names {len(self.depths)} stages, heads {len(self.heads)}: give a number "
                "for each stage in both."
            )
        for stage, heads in enumerate(self.heads):
            if self.width_of(stage) % heads:
                raise UserError(
                    f"heads of stage {stage} is {heads}; it must divide its width, "
                    f"{self.width_of(stage)}."
                )
        if int(self.width * self.mlp_ratio) < 1:
            raise UserError(f"mlp_ratio is {self.mlp_ratio}; the MLP needs a hidden unit.")

    def width_of(self, stage: int) -> int:
        """Features of a place in a stage."""
        return self.width * 2**stage

    def hidden_of(self, stage: int) -> int:
        """Hidden units of an MLP in a stage."""
        return int(self.width_of(stage) * self.mlp_ratio)

    def grids(self, image_size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Height and width of every stage; odd ones grow by one place before they are halved."""
        found = [grid_of(image_size, self.patch)]
        for _ in self.depths[1:]:
            height, width = found[-1]
            found.append(((height + 1) // 2, (width + 1) // 2))
        return tuple(found)

    def windows(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The side of every stage's windows."""
        return tuple(min(self.window, *grid) for grid in self.grids(image_size))

    @classmethod
    def tiny(cls, **changes: Any):
        """Swin-T."""
        return replace(cls(), **changes)

    @classmethod
    def small(cls, **changes: Any):
        """Swin-S: 18 blocks in the third stage."""
        return replace(cls(depths=(2, 2, 18, 2)), **changes)

    @classmethod
    def base(cls, **changes: Any):
        """Swin-B: width 128."""
        return replace(cls(width=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32)), **changes)


def offsets(window: int) -> np.ndarray:
    """For every pair of places in a window the row of the table of biases, int [T, T].

    Rows count the vertical offset first, both from -(window - 1) on.
    """
    place_2T = np.mgrid[:window, :window].reshape(2, -1)
    apart_2TT = place_2T[:, :, None] - place_2T[:, None, :] + window - 1
    return apart_2TT[0] * (2 * window - 1) + apart_2TT[1]


def apart(grid: tuple[int, int], window: int, shift: int) -> np.ndarray:
    """What is added to scores inside the windows of a rolled map, float32 [windows, T, T].

    0 where two places were neighbours before rolling, `APART` where they were not.
    """
    regions = []
    for side in grid:
        place = np.arange(side)
        regions.append(1 * (place >= side - window) + (place >= side - shift))
    region_HW = 3 * regions[0][:, None] + regions[1][None, :]
    region_NT = rearrange(region_HW, "(h p) (w q) -> (h w) (p q)", p=window, q=window)
    same_NTT = region_NT[:, None, :] == region_NT[:, :, None]
    return np.where(same_NTT, 0.0, APART).astype(np.float32)


class WindowAttention(nnx.Module):
    """Attention of the places of a window, with a bias for every offset and head; one fused qkv."""

    def __init__(
        self, width: int, heads: int, window: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        self.qkv: Any = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj: Any = Linear(width, width, dtype=dtype, rngs=rngs)
        table = trunc_normal(rngs.params(), ((2 * window - 1) ** 2, heads))
        self.offset_bias = nnx.Param(table)
        self.heads, self.window = heads, window

    def __call__(self, x_MTD: Array, apart_NTT: Array | None) -> Array:
        """M = B * N windows, those of an image together; apart_NTT as `apart` gives it."""
        return self.proj(self.mixed(x_MTD, apart_NTT))

    def mixed(self, x_MTD: Array, apart_NTT: Array | None) -> Array:
        """What the heads give, in front of the last linear layer."""
        q, k, v = rearrange(self.qkv(x_MTD), "m t (n h d) -> n m h t d", n=3, h=self.heads)
        bias_TTH = self.offset_bias.get_value()[offsets(self.window)]
        bias = jnp.moveaxis(bias_TTH, -1, 0)[None]
        if apart_NTT is not None:
            images = x_MTD.shape[0] // apart_NTT.shape[0]
            bias = jnp.tile(bias + apart_NTT[:, None], (images, 1, 1, 1))
        return attend(q, k, v, bias)


# Attention inside windows, all of it or a part: `WindowAttention`, or its `mixed`.
InWindow = Callable[[Array, "Array | None"], Array]


class SwinBlock(nnx.Module):
    """Attention in windows and an MLP, each behind a LayerNorm and around a residual.

    shifted: by how many places the windows are moved, 0 for not at all.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        window: int,
        shift: int,
        *,
        drop_path: float = 0.0,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm1, self.norm2 = LayerNorm(width, EPSILON), LayerNorm(width, EPSILON)
        self.attn = WindowAttention(width, heads, window, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, hidden, dtype=dtype, rngs=rngs)
        self.window, self.shift, self.drop_path = window, shift, drop_path

    def __call__(self, x_BHWD: Array, key: Array | None = None) -> Array:
        keys = (None, None) if key is None else jax.random.split(key)
        y_BHWD = self.in_windows(self.norm1(x_BHWD), self.attn)
        x_BHWD = x_BHWD + drop_path(y_BHWD, self.drop_path, keys[0])
        y_BHWD = self.mlp(self.norm2(x_BHWD))
        return x_BHWD + drop_path(y_BHWD, self.drop_path, keys[1])

    def in_windows(self, x_BHWD: Array, attend: InWindow) -> Array:
        """`attend` of this block's windows of a map, as a map again.

        Places are added below and on the right where windows do not fit; all see them there, as
        published.
        """
        batch, height, width = x_BHWD.shape[:3]
        w = self.window
        x = jnp.pad(x_BHWD, ((0, 0), (0, -height % w), (0, -width % w), (0, 0)))
        grid = (x.shape[1], x.shape[2])
        # A single window has no neighbour to look into.
        shift = self.shift if min(height, width) > w else 0
        x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
        x_MTD = rearrange(x, "b (h p) (w q) d -> (b h w) (p q) d", p=w, q=w)
        y_MTD = attend(x_MTD, jnp.asarray(apart(grid, w, shift)) if shift else None)
        form = {"b": batch, "h": grid[0] // w, "p": w, "q": w}
        y = rearrange(y_MTD, "(b h w) (p q) d -> b (h p) (w q) d", **form)
        y = jnp.roll(y, (shift, shift), (1, 2)) if shift else y
        return y[:, :height, :width]


class PatchMerging(nnx.Module):
    """2 x 2 places side by side, normalised, to one of twice the width without a bias."""

    def __init__(self, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * width, EPSILON)
        self.reduction: Any = Linear(4 * width, 2 * width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: Array) -> Array:
        height, width = x_BHWD.shape[1:3]
        x = jnp.pad(x_BHWD, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
        # Column by column: the upper left place, the lower left one, then the right ones.
        x = rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)
        return self.reduction(self.norm(x))


# What happens in one block: (block, its stage, its number within the stage, map, key) to the map.
SwinStep = Callable[[SwinBlock, int, int, Array, "Array | None"], Array]


def as_it_stands(block: SwinBlock, stage: int, i: int, x_BHWD: Array, key: Array | None) -> Array:
    """The block itself."""
    return block(x_BHWD, key)


class SwinStage(nnx.Module):
    """Blocks on one grid, and the merging in front of them where it is not the first."""

    def __init__(
        self, config: SwinConfig, number: int, window: int, rates: list[float], rngs: nnx.Rngs
    ):
        dtype, width = jnp.dtype(config.dtype), config.width_of(number)
        merge = PatchMerging(width // 2, dtype=dtype, rngs=rngs) if number else None
        self.merge = merge
        self.blocks = nnx.List(
            SwinBlock(
                width,
                config.heads[number],
                config.hidden_of(number),
                window,
                window // 2 if i % 2 else 0,
                drop_path=rate,
                dtype=dtype,
                rngs=rngs,
            )
            for i, rate in enumerate(rates)
        )


class SwinTrunk(nnx.Module):
    """Pixels to the maps of all stages.

    image_size: decides the windows of stages whose grid is smaller than `window`; images of other
    sizes are read with the same windows.
    """

    def __init__(self, config: SwinConfig, image_size: tuple[int, int], *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.config, self.dtype = config, dtype
        self.patch_embed = PatchEmbed(config.patch, config.width, dtype=dtype, rngs=rngs)
        self.patch_norm = LayerNorm(config.width, EPSILON)
        blocks = sum(config.depths)
        rates = [config.drop_path * i / max(blocks - 1, 1) for i in range(blocks)]
        first = np.cumsum((0, *config.depths))
        self.stages = nnx.List(
            SwinStage(config, i, window, rates[first[i] : first[i + 1]], rngs)
            for i, window in enumerate(config.windows(image_size))
        )
        self.norm = LayerNorm(config.width_of(len(config.depths) - 1), EPSILON)

    def levels(
        self, image_BHWC: Array, key: Array | None = None, step: SwinStep = as_it_stands
    ) -> list[Array]:
        """The map behind every stage's blocks, [B, h, w, D] each, the last one normalised.

        key: for stochastic depth; each block gets one of its own. step: what a system does in a
        block.
        """
        height, width = grid_of((image_BHWC.shape[1], image_BHWC.shape[2]), self.config.patch)
        x_BPD = self.patch_norm(self.patch_embed(image_BHWC))
        x = rearrange(x_BPD, "b (h w) d -> b h w d", h=height, w=width)
        found, number = [], 0
        for level, stage in enumerate(self.stages):
            x = x if stage.merge is None else stage.merge(x)
            for i, block in enumerate(stage.blocks):
                x = step(
                    block, level, i, x, None if key is None else jax.random.fold_in(key, number)
                )
                number += 1
            found.append(x)
        return [*found[:-1], self.norm(found[-1])]
