"""V-MoE on rooms: which of five kinds of scene an image shows.

    python train.py rooms/vmoe_tiny

Paper: Riquelme et al., NeurIPS 2021 (arXiv:2106.05974). Away from its recipe, because 2,000 scenes
are few: a convolutional stem, two blocks, 8 experts, AdamW. Expected on the 400 test scenes: see
the README.

The same network with experts that choose their tokens, as Soft MoE with one slot per expert and a
mean instead of a class token, or dense:

    python train.py rooms/vmoe_tiny --name choose --model.routing experts_choose \\
      --model.capacity_factor 1 --model.capacity_rounding round
    python train.py rooms/vmoe_tiny --name soft --model.routing soft --model.slots 8 \\
      --model.pool mean
    python train.py rooms/vmoe_tiny --name dense --model.moe_last 0
"""

from __future__ import annotations

from moezoo.data.config import DataConfig
from moezoo.models.vmoe import VMoEConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

config = Config(
    name="vmoe_tiny",
    tasks=("scene",),
    data=DataConfig(resolution=(64, 64), train=2000, test=400, augment=("flip", "photometric")),
    model=VMoEConfig(
        width=96,
        depth=4,
        heads=3,
        patch=8,
        stem="conv",
        mlp_ratio=2.0,
        experts=8,
        top_k=2,
    ),
    optimiser=OptimConfig(kind="adamw", lr=1e-3, warmup=100, weight_decay=0.1, clip=1.0),
    train=TrainConfig(steps=1500, batch=16, importance_weight=0.005, load_weight=0.005),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=500),
)
