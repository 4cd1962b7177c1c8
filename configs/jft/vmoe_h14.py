"""V-MoE-H/14 with 64 experts in every second block, for a TPU pod of 512 chips.

    moezoo plan jft/vmoe_h14 --topology v5p:8x8x8
    moezoo plan jft/vmoe_h14 --topology v6e:16x16 --mesh.fsdp 4 --train.batch 2048

Paper: Riquelme et al., NeurIPS 2021 (arXiv:2106.05974), whose H/14 has 32 experts and is trained on
JFT-300M, a data set that was never published; the recipe is the one in its code for ImageNet-21k
(peak 3e-4, clip 1.0, cosine instead of linear decay). `rooms` at 224 x 224 stands in for the images
and its kinds of scene for the classes. Not trained by us: it needs a pod. Compiling takes 7 to 11
minutes on two CPU cores.
"""

from __future__ import annotations

from moezoo.domains.images.domain import DataConfig
from moezoo.models.vmoe.model import VMoEConfig
from moezoo.train.config import Config, MeshConfig, OptimConfig, TrainConfig

config = Config(
    name="vmoe_h14",
    tasks=("scene",),
    data=DataConfig(resolution=(224, 224), train=100_000, test=2_000, augment=("flip",)),
    model=VMoEConfig.huge(experts=64, top_k=2, dispatch="all_to_all", dtype="bfloat16"),
    optimiser=OptimConfig(kind="adamw", lr=3e-4, warmup=10_000, weight_decay=0.1, clip=1.0),
    train=TrainConfig(steps=300_000, batch=4096, importance_weight=0.005, load_weight=0.005),
    mesh=MeshConfig(fsdp=8, expert=8),
)
