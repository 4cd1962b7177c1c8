"""Multiply-accumulates of a forward pass from formulas: the parts that several systems share.

A system's `macs(size, tasks)` puts them together (`models.shared.config.ModelTraits`). Biases,
norms, softmax and what else is no matrix product do not count, as in the papers' tables.
"""

from __future__ import annotations

from typing import NamedTuple

from moezoo.backbones.vit import ViTConfig
from moezoo.nn.heads import upsamplings


class Macs(NamedTuple):
    """Multiply-accumulates for one example."""

    encoder: int
    routers: int
    heads: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.encoder + self.routers + self.heads


class Half(NamedTuple):
    """Multiply-accumulates of one half of a block, attention or MLP, in one pass of n tokens."""

    products: int
    router: int = 0


def attention(width: int, inner: int, n: int) -> int:
    """Attention of n tokens: four matrices between `width` and `inner`, and the heads' products."""
    return 4 * width * inner * n + 2 * n * n * inner


def mlp(width: int, hidden: int, n: int) -> int:
    """A dense MLP on n tokens."""
    return n * 2 * width * hidden


def chosen_experts(width: int, hidden: int, top_k: int, experts: int, n: int) -> Half:
    """MLP experts of which each of n tokens chooses `top_k`, and the linear router that scores."""
    return Half(top_k * mlp(width, hidden, n), n * experts * width)


def stem(config: ViTConfig, patches: int) -> int:
    """Pixels to patches: one linear map each, or convolutions of stride 2 and a last linear map."""
    d = config.width
    if config.stem == "patch":
        return 3 * config.patch**2 * d * patches
    steps, total, inputs = upsamplings(config.patch), d * d * patches, 3
    for step in range(steps):
        outputs = max(8, d >> (steps - 1 - step))  # the channels of `nn.embed.ConvStem`
        total += patches * 4 ** (steps - 1 - step) * 9 * inputs * outputs
        inputs = outputs
    return total


def dense_trunk(config: ViTConfig, patches: int, tokens: int) -> int:
    """Patches and dense blocks."""
    d = config.width
    block = attention(d, d, tokens) + mlp(d, config.mlp_hidden, tokens)
    return stem(config, patches) + config.depth * block


def up_convolution_head(config: ViTConfig, channels: int, patches: int, outputs: int) -> int:
    """A head that doubles the grid by convolutions of `channels` until it has the image's size."""
    steps = upsamplings(config.patch)
    total, inputs, pixels = 0, config.width, patches
    for step in range(steps):
        pixels = patches * 4**step
        total += pixels * 9 * inputs * channels
        inputs = channels
    # The last convolution, 1x1, stands in front of the last doubling, as in `UpConvHead`.
    return total + pixels * channels * outputs
