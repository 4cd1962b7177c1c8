"""A data set and configurations small enough to train in a test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from moezoo.data.source import ArraySource, Info, Labels
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.vit_dense.model import ViTDenseConfig
from moezoo.train.config import CheckpointConfig, Config, EvaluateConfig, OptimConfig, TrainConfig

CLASSES = 5
SIZE = (16, 16)


def source(count: int = 12, split: str = "train", seed: int = 0) -> ArraySource:
    """Random images with labels that follow from them."""
    rng = np.random.default_rng([seed, len(split)])
    image = rng.integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)
    normals = image.astype(np.float32) / 127.5 - 1.0
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-6)
    arrays = {
        "image": image,
        "semseg": (image[..., 0] // 52).astype(np.uint8),
        "edge": (image[..., 1] > 200).astype(np.uint8),
        "depth": 1.0 + image[..., 2].astype(np.float32) / 64.0,
        "normals": normals,
    }
    names = tuple(f"class {i}" for i in range(CLASSES))
    labels = {"semseg": Labels(names, np.zeros((CLASSES, 3), np.uint8))}
    info = Info("tiny", split, SIZE, ("semseg", "normals", "edge", "depth"), labels, kinds=KINDS)
    return ArraySource(info, arrays)


def model(**changes: Any) -> M3ViTConfig:
    """Two blocks, the second with four experts."""
    sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4}
    sizes |= {"experts": 4, "top_k": 2, "expert_ratio": 1.0, "head_channels": 8}
    return M3ViTConfig(**(sizes | changes))


def dense(**changes: Any) -> ViTDenseConfig:
    """The dense model of the same sizes."""
    sizes: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2, "patch": 4, "mlp_ratio": 2.0}
    return ViTDenseConfig(**(sizes | {"head_channels": 8} | changes))


def config(directory: str, **changes: Any) -> Config:
    """Six steps of eight examples."""
    return replace(
        Config(
            name="tiny",
            directory=directory,
            tasks=("semseg", "depth"),
            model=model(),
            optimiser=OptimConfig(lr=1e-2),
            train=TrainConfig(steps=6, batch=8, log_every=2),
            evaluate=EvaluateConfig(pictures=1),
            checkpoint=CheckpointConfig(every=2),
        ),
        **changes,
    )
