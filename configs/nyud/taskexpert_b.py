"""Memorial-MoE with ViT-B on NYUD-v2, four tasks.

Our Memorial-MoE, a reconstruction of TaskExpert (arXiv:2307.15324), whose code was never released:
the decoder of the PASCAL-Context model. The recipe is that of the same authors' public code
(TaskPrompter), which is not confirmed for TaskExpert: Adam with L2, poly schedule, 40,000 steps of
4 images, clip 10.

The archive is not part of this project: unpack NYUDv2.tar.gz and name its folder,

    python train.py nyud/taskexpert_b --data.archive NYUDv2

or try the same program on a few rendered rooms: `--data.name rooms --data.train 40 --data.test 10`.
The published encoders start from ImageNet (augreg) weights: `--start-from FILE.npz`; without it
this starts from scratch. Not trained by us: it needs accelerators. One chip's share of a step:

    moezoo plan nyud/taskexpert_b --topology v5p:2x2x1
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.train.config import Config, OptimConfig, TaskWeights, TrainConfig

config = Config(
    name="nyud_taskexpert_b",
    tasks=("semseg", "normals", "edge", "depth"),
    data=DataConfig(
        name="nyud", resolution=(448, 576), augment=("scale", "crop", "flip", "distort")
    ),
    model=TaskExpertConfig.base(decoder_width=384, experts=5, drop_path=0.15),
    optimiser=OptimConfig(
        kind="adam", lr=2e-5, weight_decay=1e-6, decay="all", schedule="poly", power=0.9, clip=10.0
    ),
    train=TrainConfig(
        steps=40_000,
        batch=4,
        importance_weight=0.0,
        weights=TaskWeights(semseg=1.0, depth=1.0, normals=10.0, edge=50.0),
    ),
    protocol=ProtocolConfig(edge_positive_weight=0.95),
)
