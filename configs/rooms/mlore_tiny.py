"""MLoRE on rooms: four dense tasks at once.

    python train.py rooms/mlore_tiny

Paper: Yang et al., CVPR 2024 (arXiv:2403.17749). Trunk, data, steps and optimiser are those of
`rooms/m3vit_tiny`; the decoder reads both blocks, with eight experts of ranks 2 to 9, of which an
image gets five per task. Scores are in the README.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.mlore.model import MLoREConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TaskWeights,
    TrainConfig,
)

config = Config(
    name="mlore_tiny",
    tasks=("semseg", "normals", "edge", "depth"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=MLoREConfig(
        width=96,
        depth=2,
        heads=3,
        patch=8,
        stem="conv",
        levels=2,
        decoder_width=32,
        ranks=(2, 3, 4, 5, 6, 7, 8, 9),
        task_rank=6,
        top_k=5,
    ),
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=100, weight_decay=0.05, clip=5.0),
    train=TrainConfig(
        steps=1800,
        batch=8,
        weights=TaskWeights(semseg=8.0, depth=4.0),
        class_balance=0.5,
        importance_weight=3e-4,
    ),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=450),
)
