"""Conditional MoE at Uni-Perceiver-MoE's base size and with its recipe, on images with captions.

    moezoo plan rooms/conditional_moe_base --topology v5p:4x4x4 --mesh.fsdp 8

Paper: Zhu et al., arXiv:2206.04674, stage 1 of the published configuration: 12 blocks, 8 maps in
every second one, of which attributes mix 2, 230,000 steps, peak rate 1e-3, clip 0.1. Its sixteen
data sets are not read here: rooms stand in for them, for planning; we have not trained it.
The step compiles for those 64 chips and needs 5.1 GB on each.
"""

from __future__ import annotations

from moezoo.domains.pairs.domain import PairsDataConfig, Shares
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

config = Config(
    name="conditional_moe_base",
    tasks=("scene", "caption", "retrieval", "mlm", "text_scene", "counts"),
    data=PairsDataConfig(
        resolution=(224, 224),
        length=40,
        train=20_000,
        test=2_000,
        # Its images, captions, pairs and texts: 3.7, 1.8, 1.8 and 2.75 of about 10.
        shares=Shares(scene=3.7, caption=1.8, retrieval=1.8, mlm=2.0, text_scene=0.75),
    ),
    model=ConditionalMoEConfig(vocabulary=81, text_length=40, dtype="bfloat16"),
    optimiser=OptimConfig(
        kind="adamw", lr=1e-3, warmup=10_000, b2=0.95, eps=1e-6, weight_decay=0.2, clip=0.1
    ),
    train=TrainConfig(steps=230_000, batch=2048, importance_weight=0.0, log_every=100),
    evaluate=EvaluateConfig(every=10_000, batch=512),
    checkpoint=CheckpointConfig(every=5_000),
)
