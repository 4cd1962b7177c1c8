"""A run of a dense task and of a system on images that the package does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from flax import nnx

from moezoo.backbones.vit import whole_block
from moezoo.data.source import ArraySource, Info
from moezoo.domains.images.domain import DataConfig, learn_source
from moezoo.domains.images.tasks import TASKS, depth
from moezoo.label import value
from moezoo.models.shared.multitask import MultiTaskConfig, TaskPasses
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE
from moezoo.nn.routers import MultiGateRouter
from moezoo.ops import grouped
from moezoo.tasks.registry import TaskKind
from moezoo.train.config import CheckpointConfig, Config, OptimConfig, TrainConfig

BRIGHTNESS = value(unknown=-1)


def brightness(weight: float = 1.0) -> Any:
    """The mean of the three colours, from 0 to 1: depth's loss and score on other labels."""
    return replace(depth.task(weight), name="brightness", label=BRIGHTNESS, output=None)


def opened(data: DataConfig, split: str) -> ArraySource:
    """Images of noise."""
    count = data.train if split == "train" else data.test
    image = np.random.default_rng(len(split)).integers(
        0, 256, (count, *data.resolution, 3), np.uint8
    )
    info = Info(
        "noise", split, data.resolution, ("brightness",), {}, kinds={"brightness": BRIGHTNESS}
    )
    return ArraySource(
        info, {"image": image, "brightness": (image.mean(-1) / 255).astype(np.float32)}
    )


@dataclass(frozen=True)
class ToyConfig(MultiTaskConfig):
    """A vision transformer with experts in its last block, a router per task."""

    experts: int = 4

    def build(self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs) -> Any:
        def make(block: int, rngs: nnx.Rngs) -> nnx.Module:
            if block < self.depth - 1:
                return MLP(self.width, self.mlp_hidden, rngs=rngs)
            router = MultiGateRouter(len(tasks), self.width, self.experts, 2, rngs=rngs)
            return MoE(router, MLPExperts(self.experts, self.width, 8, rngs=rngs), grouped.auto)

        return Toy(self, tasks, image_size, make_mlp=make, rngs=rngs)


class Toy(TaskPasses):
    """One task reads the whole trunk."""

    def encode(self, image_BHWC: Any, ids: Any, key: Any, records: Any) -> Any:
        (task,) = ids  # of one task, so that rows need no numbers
        return self.run(self.embed(image_BHWC), key, records, whole_block(Context(task)))


TASKS["brightness"] = TaskKind(brightness)
learn_source("noise", opened)
config = Config(
    "brightness",
    ToyConfig(width=16, depth=2, heads=2, patch=4, head_channels=8),
    ("brightness",),
    DataConfig(name="noise", resolution=(16, 16), train=16, test=8, augment=()),
    OptimConfig(lr=1e-2, warmup=0),
    TrainConfig(steps=4, batch=4, log_every=1),
    checkpoint=CheckpointConfig(every=2),
)
