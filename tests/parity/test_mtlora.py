"""Linear layers with shared and tasks' own LoRAs against MTLoRA's published code."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn.layers import Linear
from moezoo.nn.lowrank import LowRank
from moezoo.nn.task_lowrank import MODES, SharedLinear, TaskLinear
from tests.fixtures import load, names

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
FILES = names("mtlora", "mtlora", ["mtlora"])
STREAMS = [mode for mode, way in MODES.items() if way.of_task is not None]


def base_of(z: dict[str, np.ndarray]) -> Linear:
    made = Linear(z["W"].shape[1], z["W"].shape[0], rngs=nnx.Rngs(0))
    made.kernel.set_value(jnp.asarray(z["W"].T))
    made.bias.set_value(jnp.asarray(z["bias"]))
    return made


def lora_of(down: np.ndarray, up: np.ndarray, scale: np.ndarray) -> LowRank:
    rank, inputs = down.shape
    made = LowRank(inputs, up.shape[0], rank, scale=float(scale), rngs=nnx.Rngs(0))
    made.down.set_value(jnp.asarray(down.T))
    made.up.set_value(jnp.asarray(up.T))
    return made


def layer_of(z: dict[str, np.ndarray], mode: str) -> TaskLinear:
    """The published layer: frozen weights read the shared features."""
    shared = lora_of(z["shared_A"], z["shared_B"], z["shared_scale"])
    own = {t: lora_of(z[f"A|{t}"], z[f"B|{t}"], z["task_scale"]) for t in z["tasks"].tolist()}
    summed = MODES[mode].shared == "sum"
    return TaskLinear(base_of(z), None if summed else shared, own, mode=mode, base_reads="shared")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("given", ["shared_in", "task_in"])
@pytest.mark.parametrize("mode", STREAMS)
def test_streams(file: str, mode: str, given: str) -> None:
    z = load("mtlora", file)
    tasks, x = z["tasks"].tolist(), jnp.asarray(z["x"])
    by_task = {t: jnp.asarray(z[f"x_task|{t}"]) for t in tasks} if given == "task_in" else {}
    found = layer_of(z, mode).streams(x, by_task, tasks)
    np.testing.assert_allclose(found.shared, z[f"{mode}_{given}_y"], **CLOSE)
    for task in tasks:
        np.testing.assert_allclose(found.tasks[task], z[f"{mode}_{given}_y|{task}"], **CLOSE)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("given", ["shared_in", "task_in"])
def test_shared_lora_alone(file: str, given: str) -> None:
    z = load("mtlora", file)
    shared = lora_of(z["shared_A"], z["shared_B"], z["shared_scale"])
    layer, x = SharedLinear(base_of(z), shared), jnp.asarray(z["x"])
    np.testing.assert_allclose(layer(x), z[f"lora_only_{given}_y"], **CLOSE)
    np.testing.assert_allclose(layer.of_task(0)(x), z[f"lora_only_{given}_y"], **CLOSE)
    assert not [name for name in z if name.startswith(f"lora_only_{given}_y|")]
