"""Conditional MoE on rooms: one encoder for five tasks on images and captions, one task per step.

    python train.py rooms/conditional_moe_tiny
    python train.py rooms/conditional_moe_tiny --name dense --model.level dense
    python train.py rooms/conditional_moe_tiny --name token --model.level token
    python train.py rooms/conditional_moe_tiny --name alike --train.task-gradients normalised
    moezoo interference runs/dense runs/conditional_moe_tiny

Paper: Zhu et al., arXiv:2206.04674; see `models/conditional_moe`. The tasks: kind of room from
the image, captions, retrieval of captions and images, hidden words, kind of room from the things in
it. A sixth, `counts`, is scored and never trained: which image has "two chairs and a desk"? All its
attributes occur in other tasks.

Departures from the recipe, because 2,000 images are few: the image part starts from the dense
network of `rooms/vit_dense_tiny` (the weights that come with the package; for what is measured
below, a run of that configuration) and every expert as a copy of its maps, so layer scale starts at
1 and word embeddings with a deviation of 0.5; the mean of all tokens represents a sequence; two
blocks, both with experts; AdamW at 1e-3.

Measured over seeds 0 to 2 on 400 test rooms, two CPU cores: kind of room 0.420, captions 0.733,
retrieval 0.051 (of 100), hidden words 0.474, room from text 0.916; dense 0.397, 0.727, 0.032,
0.454, 0.881. A run takes five to ten minutes, much of it compilation: one program per task.
"""

from __future__ import annotations

from moezoo.domains.pairs.domain import PairsDataConfig, Shares
from moezoo.models.conditional_moe.model import ConditionalMoEConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

config = Config(
    name="conditional_moe_tiny",
    tasks=("scene", "caption", "retrieval", "mlm", "text_scene", "counts"),
    data=PairsDataConfig(length=32, shares=Shares(scene=2.0, caption=2.0, retrieval=2.0)),
    model=ConditionalMoEConfig.tiny(
        vocabulary=81, text_length=32, text_std=0.5, pool="mean", drop_path=0.0
    ),
    start_from="rooms/vit_dense_tiny",
    optimiser=OptimConfig(kind="adamw", lr=1e-3, warmup=50, weight_decay=0.05, clip=1.0),
    train=TrainConfig(steps=1200, batch=32, importance_weight=0.01),
    evaluate=EvaluateConfig(batch=100, pictures=6),
    checkpoint=CheckpointConfig(every=400),
)
