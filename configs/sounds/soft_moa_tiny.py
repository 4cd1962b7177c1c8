"""Soft-MoA on a small frozen AST: twelve kinds of sound that the AST has not heard.

    python train.py sounds/soft_moa_tiny
    python train.py sounds/soft_moa_tiny --name adapter --model.update adapter --model.bottleneck 48
    python train.py sounds/soft_moa_tiny --name soft_3 --model.experts 3 --model.bottleneck 15
    python train.py sounds/soft_moa_tiny --name dense_moa --model.update dense_moa
    python train.py sounds/soft_moa_tiny --name linear --model.update linear --optimiser.lr 1e-2
    python train.py sounds/soft_moa_tiny --name full --model.update full --optimiser.lr 1e-3

Paper: Cappellazzo et al., arXiv:2402.00828; see `models/soft_moa`. The base, `sounds/ast_tiny`, is
trained first if necessary; its head is also taken over, because the base's twelve other events have
the same task name and number of classes. Scores of all of these, three seeds each, are in the
README.
"""

from __future__ import annotations

from moezoo.backbones.ast import ASTConfig
from moezoo.domains.audio.data.sounds.events import EVENTS
from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

config = Config(
    name="soft_moa_tiny",
    tasks=("event",),
    data=AudioDataConfig(mel=32, only=tuple(EVENTS)[12:]),
    model=SoftMoAConfig(
        ast=ASTConfig(
            frames=98, mel=32, patch=16, stride_time=8, stride_freq=8,
            width=96, depth=4, heads=3, hidden=384,
        ),
    ),
    start_from="sounds/ast_tiny",
    optimiser=OptimConfig(
        kind="adamw", lr=5e-3, schedule="cosine", b2=0.98, eps=1e-6, weight_decay=0.1, decay="all"
    ),
    train=TrainConfig(steps=300, batch=32, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=100, pictures=8),
    checkpoint=CheckpointConfig(every=300),
)  # fmt: skip
