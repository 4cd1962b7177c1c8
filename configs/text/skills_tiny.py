"""A small decoder trained whole on eight kinds of instructions; the base of `text/smora_tiny`.

    python train.py text/skills_tiny

Four layers of width 128, bytes as tokens. The eight tasks teach it to read an instruction and to
copy, reverse, look up and compare; the nine to which `text/smora_tiny` adapts it conflict with
them and with each other.
"""

from __future__ import annotations

from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.models.language.model import LanguageConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)

SKILLS = ("add", "copy", "initials", "larger", "next", "reverse", "upper", "vowels")

config = Config(
    name="skills_tiny",
    tasks=("lm",),
    data=TextDataConfig(name="instructions", length=64, only=SKILLS),
    model=LanguageConfig(
        decoder=DecoderConfig(
            vocabulary=259, width=128, depth=4, heads=4, groups=2, hidden=256, length=128
        )
    ),
    optimiser=OptimConfig(
        kind="adamw", lr=3e-3, schedule="cosine", warmup=100, weight_decay=0.05, clip=1.0
    ),
    train=TrainConfig(steps=600, batch=32, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=64),
    checkpoint=CheckpointConfig(every=300),
)
