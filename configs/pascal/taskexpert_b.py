"""Memorial-MoE with ViT-B on PASCAL-Context, five tasks.

Our Memorial-MoE, a reconstruction of TaskExpert (arXiv:2307.15324), whose code was never released:
164 M parameters, 282 G multiply-accumulates at 512 x 512. The recipe is that of the same authors'
public code (TaskPrompter), which is not confirmed for TaskExpert: Adam with L2, poly schedule,
40,000 steps of 4 images, clip 10.

The archive is not part of this project: unpack PASCALContext.tar.gz and name its folder,

    python train.py pascal/taskexpert_b --data.archive PASCALContext

or try the same program on a few rendered rooms: `--data.name rooms --data.train 40 --data.test 10`.
The published encoders start from ImageNet (augreg) weights: `--start-from FILE.npz`; without it
this starts from scratch. Not trained by us: it needs accelerators. One chip's share of a step:

    moezoo plan pascal/taskexpert_b --topology v5p:2x2x1
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.models.taskexpert.model import TaskExpertConfig
from moezoo.train.config import Config, OptimConfig, TaskWeights, TrainConfig

config = Config(
    name="pascal_taskexpert_b",
    tasks=("semseg", "parts", "saliency", "normals", "edge"),
    data=DataConfig(
        name="pascal", resolution=(512, 512), augment=("scale", "crop", "flip", "distort")
    ),
    model=TaskExpertConfig.base(decoder_width=384, experts=5, drop_path=0.15),
    optimiser=OptimConfig(
        kind="adam", lr=2e-5, weight_decay=1e-6, decay="all", schedule="poly", power=0.9, clip=10.0
    ),
    train=TrainConfig(
        steps=40_000,
        batch=4,
        importance_weight=0.0,
        weights=TaskWeights(semseg=1.0, parts=2.0, saliency=5.0, normals=10.0, edge=50.0),
    ),
    protocol=ProtocolConfig(saliency_channels=2, edge_positive_weight=0.95),
)
