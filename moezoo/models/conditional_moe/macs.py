"""Multiply-accumulates of a conditional encoder that classifies images, from formulas.

As `shared.macs` counts; the candidates are encoded already, what a condition mixes is merged.
"""

from __future__ import annotations

from typing import Any

from moezoo.models.conditional_moe.model import LOCATIONS, ConditionalMoEConfig
from moezoo.models.shared.macs import Macs, dense_trunk
from moezoo.nn.embed import grid_of

# How much wider than a token what a router of tokens sees is; decisions of rows are made for good.
SEEN = {"token": 1, "context": 2}


def chooser_macs(
    config: ConditionalMoEConfig, image_size: tuple[int, int], candidates: int
) -> Macs:
    """One image compared with `candidates`; where tokens decide, each has its `top_k` maps."""
    height, width = grid_of(image_size, config.patch)
    n, d = height * width + 1, config.width
    sizes: Any = config
    encoder, routers = dense_trunk(sizes, height * width, n), 0
    if config.level in SEEN:
        blocks = sum(map(LOCATIONS[config.location], range(config.depth)))
        maps = n * d * (4 * d + 2 * config.mlp_hidden)
        encoder += blocks * (config.top_k - 1) * maps
        decisions = 3 if config.mlp_gates == "separate" else 2
        summary = 2 * n * d if config.level == "context" else 0
        each = n * SEEN[config.level] * d * config.experts + summary
        routers = blocks * decisions * each
    return Macs(encoder, routers, d * candidates)
