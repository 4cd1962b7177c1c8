"""MTLoRA on rooms: a frozen ViT that four tasks have trained, for two that it has not seen.

    python train.py rooms/mtlora_vit_tiny

Paper: Agiza et al., CVPR 2024, arXiv:2403.20320; see `models/mtlora`. The base,
`rooms/vit_dense_tiny`, comes with the package.

Expected, seed 0: parts mIoU 0.196, saliency maxF 0.529; four to ten minutes on two
CPU cores that had much other work.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.mtlora.model import MTLoRAViTConfig, TaskLoRAConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    name="mtlora_vit_tiny",
    tasks=("parts", "saliency"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=MTLoRAViTConfig(
        width=96,
        depth=2,
        heads=3,
        patch=8,
        stem="conv",
        mlp_ratio=4.0,
        head_channels=24,
        lora=TaskLoRAConfig(shared_ranks=16, task_ranks=4),
    ),
    start_from="rooms/vit_dense_tiny",
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=50, weight_decay=0.05, clip=5.0),
    train=TrainConfig(steps=400, batch=8, importance_weight=0.0, class_balance=0.5),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=400),
)
