"""One small model, its calibrated path and a pruned one, made once for the whole folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.deploy import calibrate, scores, task_path
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.novices import MeanNovices
from moezoo.deploy.path import Prediction, TaskPath
from moezoo.deploy.plan import Plan
from moezoo.deploy.produce import candidates
from moezoo.deploy.usage import weighted_mean_outputs
from moezoo.domains.images.export import photos
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.nn import module
from moezoo.ops.routing import Routing
from moezoo.tasks.base import Task
from tests import fixtures
from tests.tasks import tables

CLASSES = 5
CHANNELS = {"semseg": CLASSES, "normals": 3, "depth": 1}
SIZE = (16, 16)
CONFIG = M3ViTConfig(
    width=16,
    depth=2,
    heads=2,
    patch=4,
    experts=6,
    top_k=2,
    moe_every=1,
    head_channels=8,
    router_std=1.0,
    task_embedding=4,
    tam=(0,),
)


RARE = 3  # an expert that few tokens choose


def build(config: Any, seed: int = 0) -> Any:
    """A model with random arrays everywhere, made without compiling its initialisation.

    Routers see tokens with mean 1, so a constant off a column is a constant off a logit.
    """
    parts = module.abstract(lambda: config.build(CHANNELS, SIZE, nnx.Rngs(0)))
    rng = np.random.default_rng(seed)

    def array(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape)
        if name.endswith("kernel"):
            stacked = leaf.ndim == 3  # experts, or routers of several tasks
            values /= np.sqrt(np.prod(leaf.shape[1 if stacked else 0 : -1]))
        elif name.endswith(("scale", "var")):
            values = 1 + 0.1 * np.abs(values)
        elif name.endswith("norm2/bias"):
            values = np.ones(leaf.shape)
        if name.endswith("router/kernel"):
            tokens = values[..., : config.width, :]
            tokens -= tokens.mean(axis=-2, keepdims=True)
            tokens[..., RARE] -= 0.6 / config.width
        return jnp.asarray(values, jnp.float32)

    def tree(shapes: Any) -> Any:
        flat = module.flatten(shapes)
        return module.unflatten({name: array(name, leaf) for name, leaf in flat.items()})

    return module.merge(parts.definition, tree(parts.params), tree(parts.stats))


def single_task(model: Any, task: str, images: np.ndarray) -> np.ndarray:
    """The whole model's logits for one task; logits and records are the program's results."""
    definition, params, stats = module.split(model)

    def run(params: Any, stats: Any, image: jax.Array) -> Any:
        output = module.merge(definition, params, stats)(image, tasks=(task,))
        return output.predictions[task], output.records

    return np.asarray(jax.jit(run)(params, stats, images)[0])


def constants(means: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Novices of a path that answer with rows of these tables [E, D]."""

    def of(table_ED: np.ndarray) -> Any:
        return lambda ids: MeanNovices(table_ED[list(ids)])

    return {name: of(table_ED) for name, table_ED in means.items()}


def batches(images: np.ndarray, size: int, **labels: np.ndarray):
    """Batches of `size` rows, the last filled up with its first rows and marked."""
    for start in range(0, len(images), size):
        rows = np.arange(start, start + size)
        arrays = {"image": images} | labels
        batch = {name: a[rows % len(images)] for name, a in arrays.items()}
        yield batch | {"valid": rows < len(images)}


@dataclass(frozen=True)
class Case:
    """A model, one task's whole path, its calibration, and the path without one expert a layer."""

    model: Any
    task: Task
    images: np.ndarray
    whole: TaskPath
    found: Calibration
    plan: Plan
    cut: TaskPath

    @property
    def means(self) -> dict[str, np.ndarray]:
        """What stands in for each expert."""
        return {name: weighted_mean_outputs(usage) for name, usage in self.found.layers.items()}

    @cached_property
    def full_logits(self) -> np.ndarray:
        """What the whole model gives for the task, [B,H,W,C]."""
        return single_task(self.model, self.task.name, self.images)

    @cached_property
    def prediction(self) -> Prediction:
        """What the pruned path gives."""
        return jax.device_get(self.cut(self.images))

    @cached_property
    def routing(self) -> dict[str, Routing]:
        """What the pruned path's routers decided, NumPy."""
        return jax.device_get(jax.jit(self.cut.run)(self.cut.weights, self.images).routing)


@pytest.fixture(scope="session")
def case() -> Case:
    model = build(CONFIG)
    images = np.random.default_rng(7).normal(size=(24, *SIZE, 3)).astype(np.float32)
    whole = task_path.task_path(model, "semseg", photos(SIZE))
    found = calibrate.calibrate(whole, batches(images, 8), "calibration data")
    kept = scores.uniform(candidates(whole, found), "frequency", CONFIG.experts - 1)
    experts = {name: layer.experts for name, layer in whole.layers.items()}
    said = "frequency", "5 per layer", found.fingerprint, "mean"
    plan = Plan("semseg", kept, experts, *said)
    cut = task_path.with_stand_ins(whole, plan, found)
    task = tables.build("semseg", classes=CLASSES)
    made = Case(model, task, images, whole, found, plan, cut)
    with fixtures.compiled_as_by_default():
        _ = made.full_logits, made.prediction  # whose bits are compared
    return made
