"""Mod-Squad on all six tasks of rooms.

    python train.py rooms/mod_squad_tiny

Paper: Chen et al., CVPR 2023 (arXiv:2212.08066); two blocks, the first with attention experts,
the second with MLP experts, one router per task. Sizes of `rooms/m3vit_six_tasks`, with 6 heads, of
which a token chooses 3. The mutual-information loss has the published weight of 0.005, which we
have not tuned: after 200 steps with 0.05 nearly all tokens of a task chose the same experts.

Measured on the 400 test scenes, seed 0, two CPU cores: mIoU 0.417, parts mIoU 0.224, saliency maxF
0.570, normals 22.2 degrees, edges odsF 0.669, depth RMSE 0.519 m.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.mod_squad.model import ModSquadConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TaskWeights,
    TrainConfig,
)

config = Config(
    name="mod_squad_tiny",
    tasks=("semseg", "parts", "saliency", "normals", "edge", "depth"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=ModSquadConfig(
        width=96,
        depth=2,
        heads=3,
        head_experts=6,
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
        importance_weight=0.0,
        mutual_information_weight=0.005,
        weights=TaskWeights(semseg=8.0, parts=8.0, depth=4.0),
        class_balance=0.5,
    ),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=450),
)
