"""Small libraries of random adapters for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.nn import module, surgery
from moezoo.nn.layers import Linear
from moezoo.weights import library as libraries
from moezoo.weights.library import BaseModel, Library, Member, NewMember
from moezoo.weights.peft import Factors

CONFIG = DecoderConfig(vocabulary=20, width=8, depth=1, heads=2, groups=1, hidden=6, length=16)


def decoder(seed: int = 0) -> Any:
    """A bare decoder of random numbers of sensible size."""
    model = CONFIG.build(nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for layer in surgery.find(model, Linear).values():
        shape = layer.kernel.get_value().shape
        layer.kernel.set_value(rng.normal(size=shape).astype(np.float32) / shape[0] ** 0.5)
    return model


def sha(model: Any) -> str:
    parts = module.split(model)
    return libraries.fingerprint(module.flatten(parts.params) | module.flatten(parts.stats))


def member(name: str, seed: int, rank: int = 2, scale: float = 0.5, **told: Any) -> NewMember:
    """Random factors on every layer of `decoder()`; `told`: fields of `Member`."""
    rng = np.random.default_rng(seed)
    layers = {
        path: layer.kernel.get_value().shape
        for path, layer in surgery.find(decoder(), Linear).items()
        if path != "lm_head"
    }
    factors = {
        path: Factors(
            rng.normal(size=(d, rank)).astype(np.float32),
            rng.normal(size=(rank, o)).astype(np.float32),
            scale,
            {},
        )
        for path, (d, o) in layers.items()
    }
    embedding = told.pop("embedding_M", None)
    return NewMember(Member(name, **told), factors, embedding)


def library(folder: Path, count: int = 3, clusters: int = 0) -> Library:
    """`count` adapters a0, a1, ... of tasks t0, t1, ... of `decoder()`."""
    base = BaseModel("tiny", sha(decoder()))
    unit = np.eye(8, dtype=np.float32)
    members = [member(f"a{i}", i, tasks=(f"t{i}",), embedding_M=unit[i]) for i in range(count)]
    return libraries.create(folder, base, members, clusters)
