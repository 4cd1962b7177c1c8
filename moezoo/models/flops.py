"""Multiply-accumulates of a forward pass from formulas.

Counted as the paper does: matrix products of the encoder including attention's, routers, and
convolutions of the heads. Norms, activations and resizes are left out. A FLOP count is twice this,
a training step about three times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moezoo.models.m3vit import M3ViTConfig
from moezoo.models.mod_squad import LAYOUTS, ModSquadConfig
from moezoo.models.multitask import MultiTaskConfig
from moezoo.nn.embed import grid_of
from moezoo.nn.heads import upsamplings


class Macs(NamedTuple):
    """Multiply-accumulates for one image."""

    encoder: int
    routers: int
    heads: int

    @property
    def total(self) -> int:
        return self.encoder + self.routers + self.heads


def macs(config: MultiTaskConfig, image_size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
    """One image, all `tasks` predicted in one call, without the training-only branch.

    With one task this is M3ViT's figure (tables 1-3 count encoder and one head). With several,
    everything before the first thing that depends on the task counts once, the rest once per task.
    """
    height, width = grid_of(image_size, config.patch)
    patches = height * width
    encoder, routers = _stem(config, patches), 0
    passes = len(tasks) if isinstance(config, ModSquadConfig) else 1
    for block in range(config.depth):
        attention, mlp = _halves(config, block, patches + 1)
        encoder += passes * attention.products
        if isinstance(config, M3ViTConfig) and config.is_moe(block):
            passes = 1 if config.routing == "single" else len(tasks)
        encoder += passes * mlp.products
        routers += passes * (attention.router + mlp.router)
    heads = sum(_head(config, patches, channels) for channels in tasks.values())
    return Macs(encoder, routers, heads)


class _Half(NamedTuple):
    """Multiply-accumulates of one half of a block in one pass of n tokens."""

    products: int
    router: int = 0


def _halves(config: MultiTaskConfig, block: int, n: int) -> tuple[_Half, _Half]:
    d = config.width
    attention = _Half(4 * d * d * n + 2 * n * n * d)
    mlp = _Half(n * 2 * d * config.mlp_hidden)
    if isinstance(config, M3ViTConfig) and config.is_moe(block):
        mlp = _mlp_experts(config, n)
    if isinstance(config, ModSquadConfig):
        inner = config.heads * config.head_width
        attention = _Half(4 * d * inner * n + 2 * n * n * inner)
        experts = LAYOUTS[config.layout](block)
        if experts[0]:
            products = (2 * d * inner + 2 * d * config.head_width) * n + 2 * n * n * inner
            attention = _Half(products, n * config.head_experts * d)
        if experts[1]:
            mlp = _mlp_experts(config, n)
    return attention, mlp


def _mlp_experts(config: M3ViTConfig | ModSquadConfig, n: int) -> _Half:
    d = config.width
    return _Half(n * config.top_k * 2 * d * config.expert_hidden, n * config.experts * d)


def _stem(config: MultiTaskConfig, patches: int) -> int:
    d = config.width
    if config.stem == "patch":
        return 3 * config.patch**2 * d * patches
    steps, total, inputs = upsamplings(config.patch), d * d * patches, 3
    for step in range(steps):
        outputs = max(8, d >> (steps - 1 - step))
        total += patches * 4 ** (steps - 1 - step) * 9 * inputs * outputs
        inputs = outputs
    return total


def _head(config: MultiTaskConfig, patches: int, outputs: int) -> int:
    c, steps = config.head_channels, upsamplings(config.patch)
    total, inputs, pixels = 0, config.width, patches
    for step in range(steps):
        pixels = patches * 4**step
        total += pixels * 9 * inputs * c
        inputs = c
    return total + pixels * c * outputs
