"""Polytropon on a small frozen decoder: nine instruction tasks share eight LoRAs.

    python train.py text/polytropon_tiny
    python train.py text/polytropon_tiny --name mhr_8 --model.heads 8

Papers: Ponti et al., arXiv:2202.13914; Caccia et al., arXiv:2211.03831; see `models/polytropon`.
Base, data, optimiser and number of ranks are those of `text/smora_tiny`, so results stand side by
side; the base, `text/skills_tiny`, is trained first if necessary. Expected
after five minutes on two CPU cores: exact match near 0.55 (README of `models/polytropon`).
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.smora_tiny import NEW
from moezoo.configs.text.smora_tiny import config as smora
from moezoo.models.polytropon.model import PolyConfig

config = replace(
    smora,
    name="polytropon_tiny",
    model=PolyConfig(
        decoder=smora.model.decoder,  # type: ignore[attr-defined]
        tasks=len(NEW),
        skills=8,
        rank=8,
    ),
)
