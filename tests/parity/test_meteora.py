"""MeteoRA's weights, layer and gate loss are the published ones."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.decoder import DecoderConfig
from moezoo.models.meteora.model import MeteoRAConfig
from moezoo.ops import lowrank
from moezoo.ops.exact import exact_product
from moezoo.ops.prototypes import expert_cross_entropy
from moezoo.ops.selection import top_k_then_softmax
from tests.fixtures import load, names

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
FILES = names("meteora", "meteora", ["meteora"])


@pytest.mark.parametrize("name", FILES)
def test_layers_of_every_k_and_temperature_are_the_published_ones(name: str) -> None:
    f = load("meteora", name)
    x_ND = jnp.asarray(f["x"]).reshape(-1, f["x"].shape[-1])
    logits_NE = exact_product(x_ND, jnp.asarray(f["gate"].T))
    np.testing.assert_allclose(logits_NE, f["gate_logits"].reshape(logits_NE.shape), **CLOSE)
    a_EDr, b_ErO = (jnp.swapaxes(jnp.asarray(f[side]), 1, 2) for side in "AB")
    bank = lowrank.stacked(a_EDr, b_ErO)
    cases = [re.fullmatch(r"w_k(\d+)_T(\d+)", key) for key in f]
    cases = [case for case in cases if case]
    assert cases
    for case in cases:
        # Quirk: the plain path ("orig") leaves the temperature out.
        k, tag = int(case[1]), f"k{case[1]}_T{case[2]}"
        for temperature, paths in ((int(case[2]), ("loop", "bmm")), (1, ("orig",))):
            chosen = top_k_then_softmax(logits_NE / temperature, k)
            hot = chosen.experts_NK[..., None] == jnp.arange(logits_NE.shape[-1])
            gates_NE = jnp.sum(jnp.where(hot, chosen.weights_NK[..., None], 0.0), axis=1)
            added_NO = float(f["scaling"]) * lowrank.by_block(x_ND, *bank, gates_NE)
            y_NO = np.asarray(x_ND) @ f["W"].T + added_NO
            if temperature == int(case[2]):
                wanted = f[f"w_{tag}"].reshape(-1, k)
                np.testing.assert_allclose(chosen.weights_NK, wanted, **CLOSE)
            for path in paths:
                wanted = f[f"y_{tag}_{path}"].reshape(y_NO.shape)
                np.testing.assert_allclose(y_NO, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FILES)
def test_the_gate_loss_and_its_gradient_are_the_published_ones(name: str) -> None:
    f = load("meteora", name)
    gates, labels = f["loss_gates"], f["loss_labels"]

    def loss(gates: jax.Array) -> jax.Array:
        # Quirk: gates are compared with the label of the next position.
        logits = gates[:, :, :-1].reshape(-1, gates.shape[-1])
        return expert_cross_entropy(logits, jnp.tile(labels[:, 1:].reshape(-1), len(gates)))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(gates))
    np.testing.assert_allclose(value, f["gate_loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient[0], f["gate_loss_grad0"], **CLOSE)


@pytest.mark.parametrize("name", FILES)
def test_the_system_s_layer_is_the_published_one(name: str) -> None:
    f = load("meteora", name)
    loras, rank, width = f["A"].shape
    decoder = DecoderConfig(vocabulary=8, width=8, depth=1, heads=2, groups=1, hidden=8)
    sizes: dict[str, Any] = {"loras": loras, "rank": rank, "alpha": float(f["alpha"])}
    x_ND = jnp.asarray(f["x"]).reshape(-1, width)
    for key in f:
        if (case := re.fullmatch(r"y_k(\d+)_T(\d+)_loop", key)) is None:
            continue
        told = {"top_k": int(case[1]), "temperature": float(case[2])}
        config = MeteoRAConfig(decoder=decoder, **sizes, **told)
        assert config.gate_weight == f["aux_coef"]
        update = config.make_update(width, f["W"].shape[0], nnx.Rngs(0))
        a_EDr, b_ErO = (jnp.swapaxes(jnp.asarray(f[side]), 1, 2) for side in "AB")
        a_DR, b_RO = lowrank.stacked(a_EDr, b_ErO)
        update.down.set_value(a_DR)
        update.up.set_value(b_RO)
        update.router.kernel.set_value(jnp.asarray(f["gate"].T))
        y_NO = np.asarray(x_ND) @ f["W"].T + update(x_ND)[0]
        np.testing.assert_allclose(y_NO, f[key].reshape(y_NO.shape), rtol=1e-4, atol=1e-4)
