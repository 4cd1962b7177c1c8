"""V-MoE on rooms: which of five kinds of scene an image shows.

    python train.py rooms/vmoe_tiny

Paper: Riquelme et al., NeurIPS 2021 (arXiv:2106.05974). Away from its recipe, because 2,000 scenes
are few: a convolutional stem, two blocks, 8 experts, the mean of all tokens instead of a class
token, AdamW.

No score of this recipe has been measured yet. What has: with batches of 16 and lr 1e-3 or 2e-3 the
network was still at chance (0.21, the best constant 0.2075) after 600 and 1,200 steps, hence the
larger batch and the lower lr; its dense form learns 64 scenes by heart in 60 steps of all of them.
A linear map of the true semantic classes' areas reaches 0.77 on the test scenes.

The same network with experts that choose their tokens, as Soft MoE, or dense:

    python train.py rooms/vmoe_tiny --name choose --model.routing experts_choose \\
      --model.capacity_factor 1 --model.capacity_rounding round
    python train.py rooms/vmoe_tiny --name soft --model.routing soft --model.slots 8
    python train.py rooms/vmoe_tiny --name dense --model.moe_last 0
"""

from __future__ import annotations

from moezoo.data.config import DataConfig
from moezoo.models.vmoe import VMoEConfig
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
