"""A small AST trained whole on twelve kinds of sound; the base of `sounds/soft_moa_tiny`.

    python train.py sounds/ast_tiny

Which event, in which register, in which room: three tasks on the first half of the events.
Measured on the 400 test clips, seed 0: accuracy 0.823 (the most frequent event: 0.085), 0.975 and
0.463 (0.36), in 12 minutes on two CPU cores that other work used most of the time. The same on one
core, where sums are rounded in another order: 0.768, 0.963 and 0.555, in 3 minutes; single runs are
no more precise than that.
"""

from __future__ import annotations

from moezoo.backbones.ast import ASTConfig
from moezoo.domains.audio.data.sounds.events import EVENTS
from moezoo.domains.audio.domain import AudioDataConfig
from moezoo.models.soft_moa.model import SoftMoAConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

AST = ASTConfig(
    frames=98, mel=32, patch=16, stride_time=8, stride_freq=8,
    width=96, depth=4, heads=3, hidden=384, init_std=0.1,
)  # fmt: skip

config = Config(
    name="ast_tiny",
    tasks=("event", "register", "room"),
    data=AudioDataConfig(
        mel=32,
        only=tuple(EVENTS)[:12],
        augment=("roll",),
    ),
    model=SoftMoAConfig(ast=AST, update="full"),
    optimiser=OptimConfig(
        kind="adamw", lr=1e-3, schedule="cosine", warmup=50, weight_decay=0.05, clip=1.0
    ),
    train=TrainConfig(steps=2000, batch=16, importance_weight=0.0),
    evaluate=EvaluateConfig(batch=100, every=500, pictures=8),
    checkpoint=CheckpointConfig(every=500),
)
