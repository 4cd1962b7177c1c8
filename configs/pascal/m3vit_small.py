"""M3ViT-small as the paper trains it on PASCAL-Context (arXiv:2210.14793, table 1; supplement A.2).

Paper: segmentation mIoU 72.8, parts mIoU 62.1, saliency mIoU 66.3, normals 14.5 degrees, edges odsF
71.7, Delta_m +2.71 % over single-task ResNet-18; the encoder starts from a mixture of experts that
the authors pretrained on ImageNet and never published. 4,998 training images make 312 steps an
epoch at batch 16; 100 epochs.

    python train.py pascal/m3vit_small

Without an archive, `rooms` at the same resolution stands in for PASCAL-Context (object parts for
human parts); with the archive: `--data.name pascal --data.archive PASCALContext`. Not trained by us
(it needs an accelerator); tests/models/test_counts.py asserts its parameter and multiply-accumulate
counts.

The published command has a load loss of the same weight but no router noise: the loss then is a
count without a gradient, and is left out here.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.train.config import Config, OptimConfig, TrainConfig

EPOCH = 312

config = Config(
    name="pascal_m3vit_small",
    tasks=("semseg", "parts", "saliency", "normals", "edge"),
    data=DataConfig(resolution=(512, 512), train=4998, test=5105, augment=("flip",)),
    model=M3ViTConfig.small(heads=12, experts=16, top_k=4, expert_ratio=1.0, tam=(0, 1)),
    optimiser=OptimConfig(
        kind="sgd", lr=0.002, momentum=0.9, weight_decay=1e-4, decay="all",
        schedule="poly", power=0.9, hold=EPOCH,
    ),
    train=TrainConfig(steps=100 * EPOCH, batch=16, importance_weight=0.01),
)  # fmt: skip
