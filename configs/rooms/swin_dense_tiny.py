"""The dense multi-task Swin transformer on rooms, with the FLOPs of the dense ViT's.

    python train.py rooms/swin_dense_tiny

Everything but the model is that of `rooms/vit_dense_tiny`. Four stages of 16 x 16 to 2 x 2 places.

Expected, seed 0: semseg mIoU 0.315, normals 25.7 degrees, edges odsF 0.613, depth RMSE 0.586 m; 14
minutes on two CPU cores that had other work besides.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.swin_dense.model import SwinDenseConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TaskWeights,
    TrainConfig,
)

config = Config(
    name="swin_dense_tiny",
    tasks=("semseg", "normals", "edge", "depth"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=SwinDenseConfig(
        width=24, depths=(2, 2, 2, 2), heads=(1, 2, 4, 8), patch=4, window=4, head_channels=12
    ),
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=100, weight_decay=0.05, clip=5.0),
    train=TrainConfig(
        steps=1800, batch=8, weights=TaskWeights(semseg=8.0, depth=4.0), class_balance=0.5
    ),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=450),
)
