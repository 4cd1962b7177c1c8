"""Images to tokens: patches and fixed positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.conv import Conv
from moezoo.nn.layers import LayerNorm, Linear, gelu, trunc_normal

Positions = Callable[[tuple[int, int], int], Array]  # (grid, width) -> [1, P, D]


def sincos2d(grid: tuple[int, int], width: int) -> Array:
    """Fixed positions, float32 [1, P, D]: sine and cosine of x, then of y, in D/4 wavelengths.

    From 2 pi to 10,000 * 2 pi patches, as in MoCo v3 (arXiv:2104.02057) and Soft MoE. Raises
    UserError for a width below 8 or not a multiple of 4.
    """
    if width < 8 or width % 4:
        raise UserError(f"width is {width}; sincos2d positions need a multiple of 4 from 8 on.")
    quarter = width // 4
    # Over quarter - 1, as big_vision: both ends of the range are wavelengths.
    omega_D = 10_000.0 ** -(jnp.arange(quarter, dtype=jnp.float32) / (quarter - 1))
    y_P, x_P = (c.reshape(-1).astype(jnp.float32) for c in jnp.mgrid[: grid[0], : grid[1]])
    x_PD, y_PD = x_P[:, None] * omega_D, y_P[:, None] * omega_D
    return jnp.concatenate([f(a) for a in (x_PD, y_PD) for f in (jnp.sin, jnp.cos)], -1)[None]


class PatchEmbed(nnx.Module):
    """One linear map of every patch x patch square, row by row; kernel [patch, patch, 3, D]."""

    def __init__(self, patch: int, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.kernel = nnx.Param(trunc_normal(rngs.params(), (patch, patch, 3, width)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.patch, self.dtype = patch, dtype

    def __call__(self, image_BHWC: Array) -> Array:
        """Tokens [B, P, D] of an image whose sides are multiples of the patch."""
        p = self.patch
        pixels = rearrange(image_BHWC, "b (h p) (w q) c -> b (h w) (p q c)", p=p, q=p)
        kernel = rearrange(self.kernel.get_value(), "p q c d -> (p q c) d").astype(self.dtype)
        return pixels.astype(self.dtype) @ kernel + self.bias.get_value().astype(self.dtype)


class ConvStem(nnx.Module):
    """3x3 convolutions of stride 2 down to the grid of patches, then one linear map.

    Makes a vision transformer train faster from little data (Xiao et al., arXiv:2106.14881).
    Channels double up to the width; each convolution is followed by LayerNorm and GELU.
    """

    def __init__(self, patch: int, width: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        steps = patch.bit_length() - 1
        channels = [3, *(max(8, width >> (steps - 1 - i)) for i in range(steps))]
        self.convs = nnx.List(
            Conv(channels[i], channels[i + 1], stride=2, dtype=dtype, rngs=rngs)
            for i in range(steps)
        )
        self.norms = nnx.List(LayerNorm(n) for n in channels[1:])
        self.proj = Linear(channels[-1], width, dtype=dtype, rngs=rngs)

    def __call__(self, image_BHWC: Array) -> Array:
        """Tokens [B, P, D] of an image whose sides are multiples of the patch."""
        x = image_BHWC
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = gelu(norm(conv(x)))
        return self.proj(rearrange(x, "b h w c -> b (h w) c"))


STEMS = {"patch": PatchEmbed, "conv": ConvStem}


def grid_of(image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Patches in height and width; raises UserError when the image does not split evenly."""
    height, width = image_size
    if patch < 1 or height < patch or width < patch or height % patch or width % patch:
        raise UserError(
            f"Images of {height}x{width} do not split into patches of {patch}x{patch}: "
            "both sides must be positive multiples of the patch."
        )
    return height // patch, width // patch
