"""A small decoder trained on text that every Python installation has.

    python train.py text/base_tiny

Four layers of width 128, bytes as tokens, rows of 128 bytes from six domains of text.
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

DECODER = DecoderConfig(
    vocabulary=259, width=128, depth=4, heads=4, groups=2, hidden=256, length=128
)

config = Config(
    name="base_tiny",
    tasks=("lm",),
    data=TextDataConfig(name="corpus", length=128),
    model=LanguageConfig(decoder=DECODER),
    optimiser=OptimConfig(
        kind="adamw", lr=3e-3, schedule="cosine", warmup=100, weight_decay=0.05, clip=1.0
    ),
    train=TrainConfig(steps=1500, batch=16, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=64, examples=512),
    checkpoint=CheckpointConfig(every=500),
)
