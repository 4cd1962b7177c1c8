"""MeteoRA on a small frozen decoder: nine instruction tasks that conflict with each other.

    python train.py text/meteora_tiny --model.library library --start-from runs/skills_tiny
    python train.py text/meteora_tiny

The first trains gates over a library's LoRAs, as the paper has it (README of `models/meteora`), the
second both at once. Base, data, optimiser and steps are those of `text/smora_tiny`, so results are
comparable; the base, `text/skills_tiny`, is trained first if necessary. Expected of the second on
two CPU cores after five minutes: exact match 0.135 (seed 0).
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.smora_tiny import NEW
from moezoo.configs.text.smora_tiny import config as smora
from moezoo.models.meteora.model import MeteoRAConfig

config = replace(
    smora,
    name="meteora_tiny",
    model=MeteoRAConfig(decoder=smora.model.decoder, loras=len(NEW)),  # type: ignore[attr-defined]
)
