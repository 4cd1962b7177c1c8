"""Second stage of ALTER, as its abstract lets one guess: a gate over the adapters of nine tasks.

    python train.py text/alter_tiny

See `models/alter`: a reconstruction. `text/alter_adapters_tiny` is trained first if necessary.

Expected, seed 0: exact match 0.065, where its first stage, the task told, has 0.372.
"""

from __future__ import annotations

from dataclasses import replace

from moezoo.configs.text.alter_adapters_tiny import config as first

config = replace(
    first,
    name="alter_tiny",
    model=replace(first.model, stage="gate"),  # type: ignore[type-var]
    start_from="text/alter_adapters_tiny",
    train=replace(first.train, steps=200),
)
