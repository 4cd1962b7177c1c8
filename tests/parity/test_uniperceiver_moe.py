"""Uni-Perceiver-MoE's gate: attributes, tasks and modalities, both noise policies."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn.condition import Condition
from moezoo.nn.condition_routers import AttributeRouter, as_it_is
from moezoo.nn.layers import gelu
from moezoo.ops.routing import Routing, constant_noise, route
from moezoo.ops.selection import (
    Selection,
    sampled_after,
    softmax_weights_renormalised,
)
from tests.fixtures import load

K = 2
ACTIVATIONS = {"noact": as_it_is, "gelu": gelu}
FILES = [f"gate_{kind}_{act}" for kind in ("attribute", "task_onehot", "modality_onehot")
         for act in ACTIVATIONS]  # fmt: skip


def router_of(file: dict, activation) -> AttributeRouter:
    """The reference's parameters in ours; torch keeps matrices as (out, in)."""
    names = sorted(name for name in file if name.startswith("param/tag_transform"))
    weights = {name.split(".", 1)[1]: file[name] for name in names}
    linear, norm = sorted({name.split(".")[0] for name in weights})
    kernel, wg = weights[f"{linear}.weight"].T, file["param/wg.weight"].T
    router = AttributeRouter(*kernel.shape, wg.shape[1], K, activation=activation, rngs=nnx.Rngs(0))
    router.embed.kernel.set_value(jnp.asarray(kernel))
    router.embed.bias.set_value(jnp.asarray(weights[f"{linear}.bias"]))
    router.norm.scale.set_value(jnp.asarray(weights[f"{norm}.weight"]))
    router.norm.bias.set_value(jnp.asarray(weights[f"{norm}.bias"]))
    router.kernel.set_value(jnp.asarray(wg))
    return router


def check(file: dict, name: str, routing: Routing) -> None:
    np.testing.assert_array_equal(routing.experts_NK.T, file[f"{name}_indices"])
    np.testing.assert_allclose(routing.weights_NK.T, file[f"{name}_gates"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FILES)
def test_gate(name: str) -> None:
    file = load("uniperceiver_moe", name)
    router = router_of(file, ACTIVATIONS[name.rpartition("_")[2]])
    condition = Condition(0, attributes_RA=jnp.asarray(file["cond"]))
    features = router.features(condition.attributes_RA)
    np.testing.assert_allclose(features, file["tag_transform_out"], rtol=1e-4, atol=1e-5)
    routing = router.decide(condition)
    np.testing.assert_allclose(routing.logits_NE, file["logits"], rtol=1e-4, atol=1e-5)
    check(file, "eval", routing)
    for std in (1.0, 2.0):
        noise, eps_NE = constant_noise(std), jnp.asarray(file["eps"])
        noisy = route(routing.logits_NE, k=K, select=router.select, noise=noise, eps_NE=eps_NE)
        check(file, f"train_vmoe_noise{std:.0f}", noisy)
    choose = sampled_after(0, jnp.asarray(file["gumbel"]))
    sampled = Selection(softmax_weights_renormalised, choose)
    check(file, "train_RSample", route(routing.logits_NE, k=K, select=sampled))
