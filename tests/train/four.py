"""The smallest run of each domain, for tests that start real processes.

`python train.py FILE` with a FILE that says `from tests.train.four import text as config`.
"""

from __future__ import annotations

from typing import Any

from moezoo.backbones.ast import ASTConfig
from moezoo.backbones.decoder import DecoderConfig
from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.domains.images.domain import DataConfig
from moezoo.domains.pairs.domain import PairsDataConfig
from moezoo.domains.text.domain import TextDataConfig
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.models.language.model import LanguageConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    LogConfig,
    OptimConfig,
    TrainConfig,
)
from tests.train import tiny

STEPS = 60


def _config(**parts: Any) -> Config:
    return Config(
        optimiser=OptimConfig(lr=1e-3),
        train=TrainConfig(steps=STEPS, batch=2, log_every=1, importance_weight=0.0),
        evaluate=EvaluateConfig(batch=2, pictures=1),
        checkpoint=CheckpointConfig(every=1000),
        log=LogConfig(tensorboard="off"),
        **parts,
    )


images = _config(
    name="images",
    tasks=("depth",),
    data=DataConfig(resolution=(16, 16), train=6, test=3, augment=("flip",)),
    model=tiny.model(depth=1, moe_every=1, experts=2, top_k=1, patch=8),
)
text = _config(
    name="text",
    tasks=("lm",),
    data=TextDataConfig(length=32, train=20, test=4, only=("copy", "upper")),
    model=LanguageConfig(
        DecoderConfig(vocabulary=259, width=8, depth=1, heads=1, groups=1, hidden=8, length=32)
    ),
)
sounds = _config(
    name="sounds",
    tasks=("event",),
    data=AudioDataConfig(frames=16, mel=16, train=4, valid=2, test=3, only=("bell", "rain")),
    model=SoftMoAConfig(
        ASTConfig(
            frames=16, mel=16, patch=8, stride_time=8, stride_freq=8,
            width=8, depth=1, heads=1, hidden=8,
        ),
        experts=2,
        bottleneck=2,
    ),
)  # fmt: skip
pairs = _config(
    name="pairs",
    tasks=("scene", "caption"),
    data=PairsDataConfig(resolution=(16, 16), length=40, train=6, test=3),
    model=ConditionalMoEConfig.tiny(
        width=8, heads=1, depth=1, experts=2, vocabulary=81, text_length=40, patch=8
    ),
)
