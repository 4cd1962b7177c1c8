"""The dense multi-task ViT on rooms: m3vit_small without experts, equal active FLOPs per token.

    python train.py rooms/vit_dense_small

Everything but the model is that of `rooms/m3vit_small`; the README's table compares the two.

Expected on the 400 test scenes, seed 0, one NVIDIA H200: mIoU 0.584, normals 16.5 degrees, edges
odsF 0.759, depth RMSE 0.420 m.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TaskWeights,
    TrainConfig,
)

config = Config(
    name="vit_dense_small",
    tasks=("semseg", "normals", "edge", "depth"),
    data=DataConfig(resolution=(64, 64), train=8000, test=400, augment=("flip",)),
    model=ViTDenseConfig(
        width=192, depth=6, heads=6, patch=8, stem="conv", mlp_ratio=4.0, head_channels=24
    ),
    optimiser=OptimConfig(kind="adamw", lr=1e-3, warmup=100, weight_decay=0.05, clip=5.0),
    train=TrainConfig(
        steps=3000, batch=32, weights=TaskWeights(semseg=8.0, depth=4.0), class_balance=0.5
    ),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=1000),
)
