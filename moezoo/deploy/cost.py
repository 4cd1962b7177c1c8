"""What a path or a whole model costs: parameters, bytes, operations, time.

Operations are those of matrix products, by a model's own formula where it has one, or counted in
its traced program (`ops.flops`).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import PathWeights, TaskPath, shapes
from moezoo.deploy.specialise import layers_of
from moezoo.models.shared.config import traits
from moezoo.nn import module
from moezoo.ops.flops import product_flops
from moezoo.tasks.base import Task
from moezoo.train.config import ModelConfig

REPEATS = 20


def parameters(weights: Mapping[str, Any]) -> int:
    """Number of scalars, running statistics of normalisations included."""
    return sum(int(np.prod(w.shape)) for w in weights.values())


def bytes_of(weights: Mapping[str, Any]) -> int:
    """Bytes of the arrays."""
    return sum(int(np.prod(w.shape)) * np.dtype(w.dtype).itemsize for w in weights.values())


def flops(config: ModelConfig, size: tuple[int, int], tasks: Mapping[str, int]) -> int | None:
    """Floating-point operations for one example by formula, two per multiply-accumulate.

    size: what the model was built for. tasks: the numbers of channels by name. A pruned path never
    needs more than a whole one: a token sent to a stand-in runs fewer experts. None for a model
    without a formula.
    """
    counted = traits(config).macs(size, tasks)
    return None if counted is None else 2 * counted.total


def traced_flops(
    call: Callable[[PathWeights, Any], Any], weights: PathWeights, reads: InputSpec
) -> int:
    """The same for a model without a formula, counted in its program for one example."""
    # That for a CPU, wherever it is counted: a GPU's kernels hide their products.
    plain = AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
    # JAX 0.12 takes axes for explicit where nothing is said.
    one = AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=plain)
    with jax.sharding.use_abstract_mesh(one):
        traced = jax.make_jaxpr(call)(shapes(weights), reads.batch(1))
    return round(product_flops(traced))


def latency(call: Callable[[Any], Any], batch: int, reads: InputSpec) -> dict[str, Any]:
    """Milliseconds of `call(given)` after a warm-up: median and 95th percentile of 20 calls."""
    given = np.random.default_rng(0).normal(size=(batch, *reads.shape)).astype(reads.dtype)
    # Before the clock: the way to the device is not the model's time.
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


class ExpertSize(NamedTuple):
    """One expert of a layer: its scalars, their bytes, and those of them that are in matrices."""

    parameters: int
    bytes: int
    matrices: int


def expert_sizes(path: TaskPath) -> dict[str, ExpertSize]:
    """The size of one expert of every MoE layer."""
    return {
        name: _expert_size(layer, len(path.layers[name].kept))
        for name, layer in layers_of(path.module(path.weights)).items()
    }


def _expert_size(layer: Any, experts: int) -> ExpertSize:
    parts = module.split(layer.experts)
    stacks = [*jax.tree.leaves(parts.params), *jax.tree.leaves(parts.stats)]
    matrices = [stack for stack in stacks if stack.ndim > 2]
    return ExpertSize(
        sum(stack.size for stack in stacks) // experts,
        sum(stack.size * stack.dtype.itemsize for stack in stacks) // experts,
        sum(stack.size for stack in matrices) // experts,
    )


def flops_of(path: TaskPath, config: ModelConfig, size: tuple[int, int], task: Task) -> int:
    """Floating-point operations of a path for one example, by formula or else by its program."""
    formula = None if path.own_count else flops(config, size, {task.name: task.channels})
    return formula or traced_flops(path.call, path.weights, path.input)


def of_path(
    path: TaskPath, config: ModelConfig, size: tuple[int, int], task: Task
) -> dict[str, Any]:
    """Cost of one path, as a certificate states it. config, size: of the whole model."""
    return {
        "parameters": parameters(path.weights),
        "bytes": bytes_of(path.weights),
        "flops_per_example": flops_of(path, config, size, task),
        "latency": [latency(path, batch, path.input) for batch in (1, 8)],
        "device": device(),
    }
