"""MoCLE's clusters, gate and layers, with its half precision and its doubled weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.models.mocle.model import ClusterRouter
from moezoo.nn.context import Context
from moezoo.ops import lowrank, prototypes
from tests.fixtures import load, names

FILES = names("mocle", "mocle_", ["mocle_experts_only", "mocle_universal"])


@pytest.mark.parametrize("name", FILES)
def test_a_layer_is_the_published_one(name: str) -> None:
    f = load("mocle", name)
    cluster_B = prototypes.nearest(jnp.asarray(f["input_emb"]), jnp.asarray(f["cluster_centers"]))
    np.testing.assert_array_equal(cluster_B, f["cluster_id"])
    logits_BE = f["task_emb"][cluster_B] @ f["gate_W"].T + f["gate_b"]
    np.testing.assert_allclose(logits_BE, f["gate_logits"], rtol=1e-4, atol=1e-5)
    probs_BE = jax.nn.softmax(jnp.asarray(logits_BE) / float(f["temperature"]), axis=-1)
    # Theirs are in float16.
    np.testing.assert_allclose(probs_BE, f["gate_probs_fp16"].astype(np.float32), atol=1e-3)
    np.testing.assert_array_equal(probs_BE.argmax(1), f["top1"])
    universal = "A|g" in f
    weigh = prototypes.twice_weighted if universal else prototypes.chosen_and_universal
    gates_BE, rest_B1 = weigh(probs_BE)
    members = [*(str(e) for e in range(gates_BE.shape[1])), *("g" if universal else "")]
    if universal:
        gates_BE = jnp.concatenate([gates_BE, rest_B1], axis=1)
    a_EDr = jnp.stack([f[f"A|{n}"].T for n in members])
    b_ErO = jnp.stack([f[f"B|{n}"].T for n in members])
    x_ND = jnp.asarray(f["x"]).reshape(-1, f["x"].shape[-1])
    gates_NE = jnp.repeat(gates_BE, f["x"].shape[1], axis=0)
    added_NO = lowrank.by_block(x_ND, *lowrank.stacked(a_EDr, b_ErO), gates_NE)
    y_NO = np.asarray(x_ND) @ f["W"].T + float(f["scaling"]) * added_NO
    np.testing.assert_allclose(y_NO, f["y"].reshape(y_NO.shape), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("name", FILES)
def test_the_system_s_router_is_the_published_one_but_for_the_doubled_weight(name: str) -> None:
    f = load("mocle", name)
    clusters, width = f["task_emb"].shape
    experts, temperature = f["gate_W"].shape[0], float(f["temperature"])
    # Every cluster is a task's here; a feature of 1 stands for the bias of the published gate.
    router = ClusterRouter(
        tuple(range(clusters)), width + 1, experts, temperature, rngs=nnx.Rngs(0)
    )
    ones = np.ones((clusters, 1), np.float32)
    router.clusters.set_value(jnp.asarray(np.concatenate([f["task_emb"], ones], axis=1)))
    kernel = np.concatenate([f["gate_W"].T, f["gate_b"][None]])
    router.kernel.set_value(jnp.asarray(kernel))
    routing = router.decide(Context(jnp.asarray(f["cluster_id"], jnp.int32)))
    best_B = f["gate_probs_fp16"].astype(np.float32).max(1)
    weights_BE = np.asarray(routing.weights_NK)
    np.testing.assert_array_equal(weights_BE[:, :-1].argmax(1), f["top1"])
    np.testing.assert_allclose(weights_BE[:, :-1].max(1), best_B, atol=1e-3)
    np.testing.assert_allclose(weights_BE[:, -1], 1 - best_B, atol=1e-3)
