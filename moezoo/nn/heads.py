"""Heads: tokens to a prediction for every pixel, and features to the logits of a vocabulary.

The logits of a large vocabulary are the largest array of a language model, so they may be left
unmade: `Hidden` holds features and their matrix, and losses make the logits a part at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.conv import BatchNorm, Conv
from moezoo.nn.layers import LayerNorm, gelu
from moezoo.ops.interpolate import double, resize


class HeadOutput(NamedTuple):
    """What a head gives.

    logits_BHWC: float32 at image resolution.
    features: [B, 2^l h, 2^l w, C] after convolution l = 1, 2, ..., h x w being the token grid.
    """

    logits_BHWC: Array
    features: tuple[Array, ...]


def upsamplings(patch: int) -> int:
    """How many doublings lead from tokens back to pixels.

    Raises UserError when the patch is not a power of two of at least 2.
    """
    if patch < 2 or patch & (patch - 1):
        raise UserError(
            f"patch is {patch}; heads that double the resolution need 2, 4, 8, 16 or another "
            "power of two."
        )
    return patch.bit_length() - 1


class ConvHead(nnx.Module):
    """Maps four times enlarged, 3x3 convolution, batch norm, GELU, 1x1 convolution; bilinear.

    The head of TaskPrompter's code base (TaskExpert and MLoRE share it).
    """

    def __init__(self, width: int, outputs: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.conv = Conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(width)
        self.out = Conv(width, outputs, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x_BHWD: Array, image_size: tuple[int, int], train: bool = False) -> Array:
        """float32 logits [B, *image_size, outputs] of maps [B, h, w, D]."""
        height, width = x_BHWD.shape[1:3]
        x = resize(x_BHWD, (4 * height, 4 * width))
        logits = self.out(gelu(self.norm(self.conv(x), train)))
        return resize(logits.astype(jnp.float32), image_size)


class PyramidHead(nnx.Module):
    """Maps of several levels, each by a 1x1 convolution to channels of its own, side by side on the
    first one's grid; 1x1 convolution, batch norm, ReLU, 1x1 convolution; bilinear.

    HRNetV2's head (arXiv:1908.07919, section 3.2), as MTLoRA's code puts it behind Swin.
    """

    def __init__(
        self,
        widths: tuple[int, ...],
        kept: tuple[int, ...],
        outputs: int,
        *,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.keep = nnx.List(
            Conv(width, n, 1, **options) for width, n in zip(widths, kept, strict=True)
        )
        self.conv = Conv(sum(kept), sum(kept), 1, **options)
        self.norm = BatchNorm(sum(kept))
        self.out = Conv(sum(kept), outputs, 1, **options)

    def __call__(
        self, maps: Sequence[Array], image_size: tuple[int, int], train: bool = False
    ) -> Array:
        """float32 logits [B, *image_size, outputs] of maps [B, h, w, D], the finest first."""
        grid = (maps[0].shape[1], maps[0].shape[2])
        kept = [keep(x) for keep, x in zip(self.keep, maps, strict=True)]
        x = jnp.concatenate([kept[0], *(resize(x, grid) for x in kept[1:])], axis=-1)
        logits = self.out(jax.nn.relu(self.norm(self.conv(x), train)))
        return resize(logits.astype(jnp.float32), image_size)


class UpConvHead(nnx.Module):
    """Progressive up-convolution to image resolution, one head per task.

    `steps` times 3x3 convolution, batch norm, ReLU, with a bilinear doubling after each but the
    last; then a 1x1 convolution and the last doubling. With steps = 4 and 256 channels this is
    M3ViT's decoder (arXiv:2210.14793, supplement A.1; SETR-PUP, arXiv:2012.15840).
    """

    def __init__(
        self,
        width: int,
        outputs: int,
        steps: int,
        *,
        channels: int = 256,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = [width] + [channels] * steps
        self.norm = LayerNorm(width)
        convs = [Conv(a, b, 3, dtype=dtype, rngs=rngs) for a, b in pairwise(sizes)]
        self.convs = nnx.List([*convs, Conv(channels, outputs, 1, dtype=dtype, rngs=rngs)])
        self.norms = nnx.List([BatchNorm(channels) for _ in range(steps)])

    def __call__(self, tokens_BTD: Array, grid: tuple[int, int], train: bool = False) -> HeadOutput:
        """tokens_BTD: the class token first, which is left out. train: as in `BatchNorm`."""
        x = self.norm(tokens_BTD[:, 1:])
        x = x.reshape(x.shape[0], *grid, x.shape[-1])
        features = []
        for i, norm in enumerate(self.norms):
            x = jax.nn.relu(norm(self.convs[i](double(x) if i else x), train))
            features.append(x)
        # Before the last doubling, as published: a quarter of the pixels.
        logits = self.convs[len(self.norms)](x).astype(jnp.float32)
        return HeadOutput(double(logits), tuple(features[1:]))


class Hidden(NamedTuple):
    """x_BTD @ kernel_DV are logits [B, T, V]."""

    x_BTD: Array
    kernel_DV: Array
