"""Multiply-accumulates of a forward pass from formulas.

Counted as the paper does: matrix products of the encoder including attention's, routers, and
convolutions of the heads. Norms, activations and resizes are left out. A FLOP count is twice this,
a training step about three times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from moezoo.backbones.vit import ViTConfig
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.mod_squad.model import LAYOUTS, ModSquadConfig
from moezoo.models.shared.multitask import MultiTaskConfig
from moezoo.models.vmoe.model import VMoEConfig, slots_of
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


def classifier_macs(
    config: VMoEConfig, image_size: tuple[int, int], tasks: Mapping[str, int]
) -> Macs:
    """One image classified for all `tasks`, by dropless experts where tokens choose."""
    height, width = grid_of(image_size, config.patch)
    tokens, d = config.tokens(image_size), config.width
    routed = EXPERTS[config.routing](config, tokens)
    dense = _Half(tokens * 2 * d * config.mlp_hidden)
    encoder, routers = _stem(config, height * width), 0
    for block in range(config.depth):
        mlp = routed if block in config.blocks_with_experts else dense
        encoder += _attention(d, d, tokens) + mlp.products
        routers += mlp.router
    if config.pool == "attention":
        encoder += 2 * d * d * (tokens + 1) + 2 * tokens * d + 2 * d * config.mlp_hidden
    read = config.representation or d
    heads = (0 if config.representation is None else d * read) + read * sum(tasks.values())
    return Macs(encoder, routers, heads)


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


def dense_trunk(config: ViTConfig, patches: int, tokens: int) -> int:
    """Patches and dense blocks, for one image."""
    d = config.width
    block = _attention(d, d, tokens) + tokens * 2 * d * config.mlp_hidden
    return _stem(config, patches) + config.depth * block


class _Half(NamedTuple):
    """Multiply-accumulates of one half of a block in one pass of n tokens."""

    products: int
    router: int = 0


def _halves(config: MultiTaskConfig, block: int, n: int) -> tuple[_Half, _Half]:
    d = config.width
    attention = _Half(_attention(d, d, n))
    mlp = _Half(n * 2 * d * config.mlp_hidden)
    if isinstance(config, M3ViTConfig) and config.is_moe(block):
        mlp = _mlp_experts(config, n)
    if isinstance(config, ModSquadConfig):
        inner = config.heads * config.head_width
        attention = _Half(_attention(d, inner, n))
        experts = LAYOUTS[config.layout](block)
        if experts[0]:
            products = (2 * d * inner + 2 * d * config.head_width) * n + 2 * n * n * inner
            attention = _Half(products, n * config.head_experts * d)
        if experts[1]:
            mlp = _mlp_experts(config, n)
    return attention, mlp


def _attention(d: int, inner: int, n: int) -> int:
    return 4 * d * inner * n + 2 * n * n * inner


def _mlp_experts(config: M3ViTConfig | ModSquadConfig, n: int) -> _Half:
    d = config.width
    return _Half(n * config.top_k * 2 * d * config.expert_hidden, n * config.experts * d)


def _chosen_by_tokens(config: VMoEConfig, n: int) -> _Half:
    d = config.width
    return _Half(n * config.top_k * 2 * d * config.mlp_hidden, n * config.experts * d)


def _chosen_by_experts(config: VMoEConfig, n: int) -> _Half:
    d, slots = config.width, config.experts * min(slots_of(config, n), n)
    return _Half(slots * 2 * d * config.mlp_hidden, n * config.experts * d)


def _mixed_in_slots(config: VMoEConfig, n: int) -> _Half:
    d, slots = config.width, config.experts * (config.slots or slots_of(config, n))
    # Tokens are compared with slots, mixed into them and out of them.
    return _Half(slots * 2 * d * config.mlp_hidden + 2 * n * slots * d, n * slots * d)


EXPERTS: dict[str, Callable[[VMoEConfig, int], _Half]] = {
    "tokens_choose": _chosen_by_tokens,
    "experts_choose": _chosen_by_experts,
    "soft": _mixed_in_slots,
}


def _stem(config: ViTConfig, patches: int) -> int:
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
