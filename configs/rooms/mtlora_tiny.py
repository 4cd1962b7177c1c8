"""MTLoRA on rooms: a frozen Swin that four tasks have trained, for two that it has not seen.

    python train.py rooms/mtlora_tiny

Paper: Agiza et al., CVPR 2024, arXiv:2403.20320; see `models/mtlora`. The base,
`rooms/swin_dense_tiny`, is trained first if necessary. Ranks are the paper's over four, as the
width is a quarter of Swin-T's.

Expected, seed 0: parts mIoU 0.159, saliency maxF 0.438; eight minutes on two CPU cores that had
much other work, most of them compiling.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.mtlora.model import MTLoRAConfig, TaskLoRAConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    name="mtlora_tiny",
    tasks=("parts", "saliency"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=MTLoRAConfig(
        width=24,
        depths=(2, 2, 2, 2),
        heads=(1, 2, 4, 8),
        patch=4,
        window=4,
        head_channels=12,
        lora=TaskLoRAConfig(shared_ranks=16, task_ranks=4),
    ),
    start_from="rooms/swin_dense_tiny",
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=50, weight_decay=0.05, clip=5.0),
    train=TrainConfig(steps=400, batch=8, importance_weight=0.0, class_balance=0.5),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=400),
)
