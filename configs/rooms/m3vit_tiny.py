"""M3ViT on rooms, the default run: four dense tasks at once, small enough for a laptop.

    python train.py

Paper: Fan et al., NeurIPS 2022 (arXiv:2210.14793); one router per task. Departures from its recipe,
because nothing is pretrained here and six minutes are short: a convolutional stem, two blocks,
AdamW, 8 experts with top-2 (an expert is twice as wide as the model: active FLOPs equal an MLP of
ratio 4), segmentation and depth weighted higher, classes weighted by the root of their rarity.

Expected on the 400 test scenes, seed 0, two CPU cores: mIoU about 0.42, normals about 21.5 degrees,
edges odsF about 0.68, depth RMSE about 0.51 m; best constants: 0.024, 56.5 degrees, -, 0.913 m.
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
    name="m3vit_tiny",
    tasks=("semseg", "normals", "edge", "depth"),
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
        weights=TaskWeights(semseg=8.0, depth=4.0),
        class_balance=0.5,
    ),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=450),
)
