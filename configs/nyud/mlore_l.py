"""MLoRE with ViT-L on NYUD-v2, four tasks.

Yang et al., CVPR 2024 (arXiv:2403.17749), sizes and recipe of the published code: 552 M parameters.

The archive is not part of this project: unpack NYUDv2.tar.gz and name its folder,

    python train.py nyud/mlore_l --data.archive NYUDv2

or try the same program on a few rendered rooms: `--data.name rooms --data.train 40 --data.test 10`.
The published encoders start from ImageNet (augreg) weights: `--start-from FILE.npz`; without it
this starts from scratch. Not trained by us: it needs accelerators. One chip's share of a step:

    moezoo plan nyud/mlore_l --topology v5p:2x2x1
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.models.mlore.model import NYUD_RANKS, MLoREConfig
from moezoo.train.config import Config, OptimConfig, TaskWeights, TrainConfig

config = Config(
    name="nyud_mlore_l",
    tasks=("semseg", "normals", "edge", "depth"),
    data=DataConfig(
        name="nyud", resolution=(448, 576), augment=("scale", "crop", "flip", "distort")
    ),
    model=MLoREConfig.large(
        decoder_width=768,
        ranks=NYUD_RANKS,
        task_rank=16,
        selection="top_k_then_softmax",
        drop_path=0.15,
    ),
    optimiser=OptimConfig(
        kind="adam", lr=1e-5, weight_decay=1e-6, decay="all", schedule="poly", power=0.9, clip=10.0
    ),
    train=TrainConfig(
        steps=40_000,
        batch=4,
        importance_weight=5e-4,
        weights=TaskWeights(semseg=1.0, depth=1.0, normals=10.0, edge=50.0),
    ),
    protocol=ProtocolConfig(edge_positive_weight=0.88),
)
