"""Multiply-accumulates of decoders on taps from formulas, counted as in `models.shared.macs`."""

from __future__ import annotations

from collections.abc import Mapping

from moezoo.models.mlore.model import MLoREConfig
from moezoo.models.shared.macs import Macs, dense_trunk
from moezoo.models.shared.multilevel import TapsConfig
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.nn.embed import grid_of


def taps_macs(config: TapsConfig, image_size: tuple[int, int], tasks: Mapping[str, int]) -> Macs:
    """One image, all `tasks` predicted in one call; every expert runs, whatever the choice."""
    height, width = grid_of(image_size, config.patch)
    places, d = height * width, config.decoder_width
    decoder, routers = 0, 0
    if isinstance(config, TaskExpertConfig):
        decoder, routers = _memorial(config, places, len(tasks))
    if isinstance(config, MLoREConfig):
        decoder, routers = _mlore(config, places, len(tasks))
    # Heads work on maps of four times the height and width.
    heads = sum(16 * places * (9 * d * d + d * channels) for channels in tasks.values())
    trunk = dense_trunk(config, places, places + config.class_token)
    return Macs(trunk + decoder, routers, heads)


def _memorial(config: TaskExpertConfig, places: int, tasks: int) -> tuple[int, int]:
    d, reads = config.decoder_width, config.memory == "expert"
    experts = config.experts * (config.width * d + 10 * d * d)
    own = 9 * d * d + (d * d if reads else 0)
    seen = config.width + (d if reads else 0)
    rows = {"image": 1, "token": places, "static": 0}[config.gate]
    router = rows * config.gate_hidden * (seen + config.mixed)
    return config.taps * places * (experts + tasks * own), config.taps * tasks * router


def _mlore(config: MLoREConfig, places: int, tasks: int) -> tuple[int, int]:
    d, quarter = config.decoder_width, config.decoder_width // 4
    low_rank = 10 * d * (sum(config.ranks) + config.task_rank)
    block = tasks * (11 * d * d + low_rank)
    mixing = tasks * (config.taps * d * d + 9 * d * config.taps)
    router = places * quarter * (d + quarter) + places * d + quarter * d
    router += 2 * quarter * (2 * len(config.ranks) + 1)
    levels = config.taps * (config.width * d + 2 * block)
    return places * (levels + mixing), 2 * config.taps * tasks * router
