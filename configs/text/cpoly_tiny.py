"""C-Poly on a small frozen decoder: nine instruction tasks that conflict with each other.

    python train.py text/cpoly_tiny

Base, data, optimiser and steps are those of `text/smora_tiny`, so results stand side by side; the
base, `text/skills_tiny`, is trained first if necessary. Expected on two
CPU cores after six minutes: exact match 0.594 (seed 0).
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.smora_tiny import NEW
from moezoo.configs.text.smora_tiny import config as smora
from moezoo.models.cpoly.model import CPolyConfig

config = replace(
    smora,
    name="cpoly_tiny",
    model=CPolyConfig(decoder=smora.model.decoder, tasks=len(NEW)),  # type: ignore[attr-defined]
)
