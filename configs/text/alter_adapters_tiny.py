"""First stage of ALTER, as its abstract lets one guess: an adapter for each of nine tasks.

    python train.py text/alter_adapters_tiny

See `models/alter`: a reconstruction. Base and data are those of `text/smora_tiny`; the base,
`text/skills_tiny`, is trained first if necessary.
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.smora_tiny import NEW
from moezoo.configs.text.smora_tiny import config as smora
from moezoo.models.alter.model import ALTERConfig

config = replace(
    smora,
    name="alter_adapters_tiny",
    model=ALTERConfig(
        decoder=smora.model.decoder,  # type: ignore[attr-defined]
        stage="adapters",
        tasks=len(NEW),
        layers=(0, 1, 2, 3),
        bottleneck=16,
    ),
)
