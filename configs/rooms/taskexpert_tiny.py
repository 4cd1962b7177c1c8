"""Our Memorial-MoE, a reconstruction of TaskExpert, on rooms: four dense tasks at once.

    python train.py rooms/taskexpert_tiny
    python train.py rooms/taskexpert_tiny --name no_memory --model.memory none
    python train.py rooms/taskexpert_tiny --name static_gates --model.gate static
    python train.py rooms/taskexpert_tiny --name one_expert --model.experts 1

Paper: Ye and Xu, ICCV 2023 (arXiv:2307.15324); see `models/taskexpert` for what is known about it.
Trunk, data, steps and optimiser are those of `rooms/m3vit_tiny`; the decoder reads both blocks and
mixes four experts and the memory at each. The commands after the first leave out what the paper
argues for; the README has their scores over three seeds. The importance loss keeps experts alive as
in that configuration; nothing published about the paper says whether it has such a loss.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TaskWeights,
    TrainConfig,
)

config = Config(
    name="taskexpert_tiny",
    tasks=("semseg", "normals", "edge", "depth"),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=TaskExpertConfig(
        width=96,
        depth=2,
        heads=3,
        patch=8,
        stem="conv",
        levels=2,
        decoder_width=32,
        experts=4,
        gate_hidden=32,
    ),
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=100, weight_decay=0.05, clip=5.0),
    train=TrainConfig(
        steps=1800,
        batch=8,
        weights=TaskWeights(semseg=8.0, depth=4.0),
        class_balance=0.5,
        importance_weight=0.01,
    ),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=450),
)
