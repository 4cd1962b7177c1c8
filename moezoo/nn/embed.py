"""Images to tokens: patches, class token, learned positions."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.conv import Conv
from moezoo.nn.layers import LayerNorm, Linear, gelu, trunc_normal


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
