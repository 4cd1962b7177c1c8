"""M3ViT on all six tasks of rooms: semseg, parts, saliency, normals, edges, depth.

    python train.py rooms/m3vit_six_tasks

The model of `rooms/m3vit_tiny` with two more routers and heads; about half as many steps a second.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TaskWeights,
    TrainConfig,
)

config = Config(
    name="m3vit_six_tasks",
    tasks=("semseg", "parts", "saliency", "normals", "edge", "depth"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=M3ViTConfig(
        width=96,
        depth=2,
        heads=3,
        patch=8,
        stem="conv",
        experts=8,
        top_k=2,
        expert_ratio=2.0,
        head_channels=24,
    ),
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=100, weight_decay=0.05, clip=5.0),
    train=TrainConfig(
        steps=1800,
        batch=8,
        importance_weight=0.01,
        weights=TaskWeights(semseg=8.0, parts=8.0, depth=4.0),
        class_balance=0.5,
    ),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=450),
)
