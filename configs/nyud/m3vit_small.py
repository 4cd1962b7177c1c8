"""M3ViT-small as the paper trains it on NYUD-v2 (arXiv:2210.14793, table 2; supplement A.2).

Paper: semantic segmentation mIoU 45.6, depth RMSE 0.589, Delta_m +1.59 % over single-task
ResNet-50; the encoder starts from a mixture of experts that the authors pretrained on ImageNet and
never published. 795 training images make 50 steps an epoch at batch 16; 100 epochs.

    python train.py nyud/m3vit_small

Without an archive, `rooms` at the same resolution stands in for NYUD-v2, with 795 training and 654
test scenes; with the archive: `--data.name nyud --data.archive NYUDv2`. Not trained by us (it needs
an accelerator); tests/models/test_counts.py asserts its parameter and multiply-accumulate counts.

The published command has a load loss of the same weight but no router noise: the loss then is a
count without a gradient, and is left out here.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.train.config import Config, OptimConfig, TrainConfig

EPOCH = 50

config = Config(
    name="nyud_m3vit_small",
    tasks=("semseg", "depth"),
    data=DataConfig(resolution=(480, 640), train=795, test=654, augment=("flip",)),
    model=M3ViTConfig.small(heads=12, experts=16, top_k=4, expert_ratio=1.0, tam=(0, 1, 2)),
    optimiser=OptimConfig(
        kind="sgd", lr=0.002, momentum=0.9, weight_decay=1e-4, decay="all",
        schedule="poly", power=0.9, hold=EPOCH,
    ),
    train=TrainConfig(steps=100 * EPOCH, batch=16, importance_weight=0.01),
)  # fmt: skip
