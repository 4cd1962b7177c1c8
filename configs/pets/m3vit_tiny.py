"""M3ViT on the Oxford-IIIT Pet data set: regions of the trimap, the pet and its outline, 128x128.

    python train.py pets/m3vit_tiny

The model of rooms/m3vit_tiny with patches of 16 (as many tokens). The data set (811 MB) is
downloaded on first use; without a network, name the folder of its two archives, images.tar.gz and
annotations.tar.gz, with --data.archive.

Not trained by us: the data set could not be downloaded where this was written. The settings are
those of rooms and may be far from the best; tests/domains/images/test_pets_run.py trains this
configuration for two steps on pictures of ellipses, which shows that it runs but says nothing about
scores.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.train.config import (
    CheckpointConfig,
    Config,
    EvaluateConfig,
    OptimConfig,
    TrainConfig,
)

config = Config(
    name="pets_m3vit_tiny",
    tasks=("semseg", "saliency", "edge"),
    data=DataConfig(name="oxford_iiit_pet", resolution=(128, 128), augment=("flip", "photometric")),
    model=M3ViTConfig(
        width=96,
        depth=2,
        heads=3,
        patch=16,
        stem="conv",
        experts=8,
        top_k=2,
        expert_ratio=2.0,
        head_channels=24,
    ),
    optimiser=OptimConfig(kind="adamw", lr=3e-3, warmup=100, weight_decay=0.05, clip=5.0),
    train=TrainConfig(steps=4600, batch=8, importance_weight=0.01),
    evaluate=EvaluateConfig(batch=40, pictures=6),
    checkpoint=CheckpointConfig(every=460),
)
