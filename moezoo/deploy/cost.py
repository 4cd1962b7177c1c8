"""What a path or a whole model costs: parameters, bytes, operations, time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from moezoo.deploy.path import TaskPath, Weights, shapes
from moezoo.deploy.products import product_flops
from moezoo.models.conditional_flops import chooser_macs
from moezoo.models.conditional_moe import ConditionalMoEConfig
from moezoo.models.flops import classifier_macs, macs
from moezoo.models.multitask import MultiTaskConfig
from moezoo.models.taps import TapsConfig
from moezoo.models.taps_flops import taps_macs
from moezoo.models.vmoe import VMoEConfig
from moezoo.tasks.base import Task
from moezoo.train.config import ModelConfig

REPEATS = 20


def parameters(weights: Mapping[str, Any]) -> int:
    """Number of scalars, running statistics of normalisations included."""
    return sum(int(np.prod(w.shape)) for w in weights.values())


def size(weights: Mapping[str, Any]) -> int:
    """Bytes of the arrays."""
    return sum(int(np.prod(w.shape)) * np.dtype(w.dtype).itemsize for w in weights.values())


def flops(config: ModelConfig, image_size: tuple[int, int], tasks: Mapping[str, int]) -> int | None:
    """Floating-point operations for one image by formula, two per multiply-accumulate.

    `tasks` are the numbers of channels by name. A pruned path never needs more than a whole one: a
    token sent to a stand-in runs fewer experts. None for a model without a formula.
    """
    if isinstance(config, VMoEConfig):
        return 2 * classifier_macs(config, image_size, tasks).total
    if isinstance(config, TapsConfig):
        return 2 * taps_macs(config, image_size, tasks).total
    if isinstance(config, ConditionalMoEConfig):
        return 2 * chooser_macs(config, image_size, sum(tasks.values())).total
    if not isinstance(config, MultiTaskConfig):
        return None
    return 2 * macs(config, image_size, tasks).total


def traced_flops(
    call: Callable[[Weights, Any], Any], weights: Weights, shape: tuple[int, ...]
) -> int:
    """The same for a model without a formula, counted in its program for one example of `shape`."""
    one = jax.ShapeDtypeStruct((1, *shape), np.float32)
    return round(product_flops(jax.make_jaxpr(call)(shapes(weights), one)))


def latency(call: Callable[[Any], Any], batch: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Milliseconds of `call(given)` after a warm-up: median and 95th percentile of 20 calls.

    shape: of one example that is given.
    """
    given = np.random.default_rng(0).normal(size=(batch, *shape)).astype(np.float32)
    placed = jax.device_put(given)
    for _ in range(2):
        jax.block_until_ready(call(placed))
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(call(placed))
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "batch": batch,
        "median_ms": round(statistics.median(times), 3),
        "p95_ms": round(float(np.percentile(times, 95)), 3),
    }


def device() -> str:
    """The device that was measured, in words."""
    first = jax.devices()[0]
    return f"{first.platform} ({first.device_kind})"


def of_path(path: TaskPath, config: ModelConfig, task: Task) -> dict[str, Any]:
    """Cost of one path, as a certificate states it."""
    shape, channels = (*path.image_size, *path.channels), {task.name: task.channels}
    return {
        "parameters": parameters(path.weights),
        "bytes": size(path.weights),
        "flops_per_image": flops(config, path.image_size, channels)
        or traced_flops(path.call, path.weights, shape),
        "latency": [latency(path, batch, shape) for batch in (1, 8)],
        "device": device(),
    }
