"""MLoRE with ViT-L on PASCAL-Context, five tasks.

Yang et al., CVPR 2024 (arXiv:2403.17749), sizes and recipe of the published code: 408 M parameters.

The archive is not part of this project: unpack PASCALContext.tar.gz and name its folder,

    python train.py pascal/mlore_l --data.archive PASCALContext

or try the same program on a few rendered rooms: `--data.name rooms --data.train 40 --data.test 10`.
The published encoders start from ImageNet (augreg) weights: `--start-from FILE.npz`; without it
this starts from scratch. Not trained by us: it needs accelerators. One chip's share of a step:

    moezoo plan pascal/mlore_l --topology v5p:2x2x1
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.models.mlore.model import MLoREConfig
from moezoo.train.config import Config, OptimConfig, TaskWeights, TrainConfig

config = Config(
    name="pascal_mlore_l",
    tasks=("semseg", "parts", "saliency", "normals", "edge"),
    data=DataConfig(
        name="pascal", resolution=(512, 512), augment=("scale", "crop", "flip", "distort")
    ),
    model=MLoREConfig.large(drop_path=0.15),
    optimiser=OptimConfig(
        kind="adam", lr=2e-5, weight_decay=1e-6, decay="all", schedule="poly", power=0.9, clip=10.0
    ),
    train=TrainConfig(
        steps=40_000,
        batch=4,
        importance_weight=3e-4,
        weights=TaskWeights(semseg=1.0, parts=2.0, saliency=5.0, normals=10.0, edge=50.0),
    ),
    protocol=ProtocolConfig(saliency_channels=2, edge_positive_weight=0.925),
)
