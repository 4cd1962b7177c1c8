"""DyT on rooms: a frozen ViT whose MLPs skip half of the tokens, for two new tasks.

    python train.py rooms/dyt_tiny

Paper: Zhao et al., NeurIPS 2024, arXiv:2403.11808; see `models/dyt`. The base,
`rooms/vit_dense_tiny`, has learned four other tasks on the same images and comes with the package.

Expected, seed 0: parts mIoU 0.192, saliency maxF 0.526; MLPs compute 51 % of the tokens; four
minutes on two CPU cores that had much other work.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.dyt.model import DyTConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    name="dyt_tiny",
    tasks=("parts", "saliency"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=DyTConfig(
        width=96,
        depth=2,
        heads=3,
        patch=8,
        stem="conv",
        mlp_ratio=4.0,
        head_channels=24,
        bottleneck=16,
    ),
    start_from="rooms/vit_dense_tiny",
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=50, weight_decay=0.05, clip=5.0),
    train=TrainConfig(steps=400, batch=8, importance_weight=0.0, class_balance=0.5),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=400),
)
