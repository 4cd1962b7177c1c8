"""Gate, adapters and mixture of MixDA against its published code."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn.context import Context
from moezoo.nn.domain_adapters import DomainAdapters, MLPGate, convex
from tests.fixtures import load, names, under

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
FOLDER = "dyt_mosa_mixda"
FILES = names(FOLDER, FOLDER, [FOLDER])


def gate_of(z: dict[str, np.ndarray]) -> MLPGate:
    parts = under(z, "mixda_gate|linear.")
    numbers = sorted({int(name.partition(".")[0]) for name in parts})
    hidden, inputs = parts[f"{numbers[0]}.weight"].shape
    experts = parts[f"{numbers[-1]}.weight"].shape[0]
    made = MLPGate(inputs, hidden, experts, reads="last", rngs=nnx.Rngs(0))
    for layer, number in zip(made.layers, numbers, strict=True):
        layer.kernel.set_value(jnp.asarray(parts[f"{number}.weight"].T))
        layer.bias.set_value(jnp.asarray(parts[f"{number}.bias"]))
    return made


def adapters_of(z: dict[str, np.ndarray]) -> DomainAdapters:
    count = z["mixda_gate_w"].shape[-1] - 1
    each = [under(z, f"mixda_adapter{i}|") for i in range(count)]
    hidden, inputs = each[0]["adapter_down.0.weight"].shape
    width = each[0]["adapter_up.weight"].shape[0]
    made = DomainAdapters(count, inputs, hidden, width, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for name, theirs in (("down", "adapter_down.0"), ("up", "adapter_up")):
        kernel = np.stack([one[f"{theirs}.weight"].T for one in each])
        getattr(made, name).set_value(jnp.asarray(kernel))
        bias = np.stack([one[f"{theirs}.bias"] for one in each])
        getattr(made, f"{name}_bias").set_value(jnp.asarray(bias))
    return made


@pytest.mark.parametrize("file", FILES)
def test_mixture(file: str) -> None:
    z = load(FOLDER, file)
    h = jnp.asarray(z["mixda_h"])
    weights = gate_of(z)(h, Context())
    np.testing.assert_allclose(weights, z["mixda_gate_w"], **CLOSE)
    found = convex(adapters_of(z)(h), h @ z["mixda_ffn_W"].T, weights)
    np.testing.assert_allclose(found, z["mixda_out"], **CLOSE)
