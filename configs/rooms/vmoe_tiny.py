"""V-MoE on rooms: classifying which of five kinds of scene an image shows.

    python train.py rooms/vit_dense_tiny
    python train.py rooms/vmoe_tiny --start-from runs/vit_dense_tiny \\
      --model.selection softmax_then_top_k_renormalised --model.dispatch auto

Paper: Riquelme et al., NeurIPS 2021 (arXiv:2106.05974); the start is sparse upcycling
(arXiv:2212.05055) from the dense network trained on four dense tasks, because 2,000 labels are few.
Departures from the recipe: a convolutional stem, two blocks, 8 experts, AdamW, a mean instead of a
class token.

Measured on the 400 test scenes, seed 0, two CPU cores, two minutes (always the most frequent kind:
0.208): accuracy 0.413; the dense network from the same start (--model.moe_last 0) 0.395. From
scratch, 600 steps are too few: 0.215, and 0.285 with --train.batch 64 --optimiser.lr 5e-4
--model.mlp_ratio 2. A linear map from the true areas of semantic classes reaches 0.77.

Experts that choose their tokens, and Soft MoE:

    python train.py rooms/vmoe_tiny --name choose --model.routing experts_choose \\
      --model.capacity_factor 1 --model.capacity_rounding round
    python train.py rooms/vmoe_tiny --name soft --model.routing soft --model.slots 8
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

config = Config(
    name="vmoe_tiny",
    tasks=("scene",),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip",)),
    model=VMoEConfig(
        width=96,
        depth=2,
        heads=3,
        patch=8,
        stem="conv",
        mlp_ratio=4.0,
        activation="gelu",
        experts=8,
        top_k=2,
        pool="mean",
    ),
    optimiser=OptimConfig(kind="adamw", lr=1e-3, warmup=50, weight_decay=0.05, clip=1.0),
    train=TrainConfig(steps=600, batch=32, importance_weight=0.005, load_weight=0.005),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=200),
)
