"""MoCLE on a small frozen decoder: nine instruction tasks that conflict with each other.

    python train.py text/mocle_tiny

Base, data, optimiser and steps are those of `text/smora_tiny`, so results stand side by side; the
base, `text/skills_tiny`, is trained first if necessary. Expected on two
CPU cores after five minutes: exact match 0.538 (seed 0).
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.smora_tiny import config as smora
from moezoo.models.mocle.model import MoCLEConfig

config = replace(
    smora,
    name="mocle_tiny",
    model=MoCLEConfig(decoder=smora.model.decoder),  # type: ignore[attr-defined]
)
