"""M3ViT's two routers, its balance loss and its MoE layer, number by number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moezoo.ops import balance
from moezoo.ops.expert import ExpertLinear
from moezoo.ops.grouped import BACKENDS
from moezoo.ops.routing import (
    Routing,
    constant_noise,
    drop_small_weights,
    expert_range,
    learned_noise,
    route,
    top_k_then_softmax,
)
from tests.fixtures import cases, load, under

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
CASES = cases("m3vit", "gate_vmoe", "training", ["eval_std1", "train_std1"])
DROPLESS = ["reference", "blocks", "ragged", "auto"]


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **CLOSE)


def reference_loss(routing: Routing) -> Array:
    """The reference's balance loss: both terms in full, the load with its mixed spaces."""
    return balance.importance_loss(routing) + balance.load_loss_mixed_spaces(routing)


def case_routing(z: dict[str, np.ndarray], x: Array, w_gate: Array) -> Routing:
    eps_NE = jnp.asarray(z["noise"]) if int(z["training"]) else None
    noise = constant_noise(float(z["noise_std"]))
    x_ND = x.reshape(-1, x.shape[-1])
    return route(x_ND @ w_gate, k=int(z["top_k"]), noise=noise, eps_NE=eps_NE)


@pytest.mark.parametrize("case", CASES)
def test_gate_vmoe(case: str) -> None:
    z = under(load("m3vit", "gate_vmoe"), f"{case}/")

    def weighted(x: Array, w_gate: Array):
        routing = case_routing(z, x, w_gate)
        return jnp.sum(routing.weights_NK * z["R"].reshape(routing.weights_NK.shape)), routing

    def loss(x: Array, w_gate: Array):
        return reference_loss(case_routing(z, x, w_gate))

    args = (jnp.asarray(z["x"]), jnp.asarray(z["w_gate"]))
    (_, routing), (dx, dw) = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(*args)
    shape = z["idx"].shape
    np.testing.assert_array_equal(np.asarray(routing.experts_NK).reshape(shape), z["idx"])
    close(routing.weights_NK.reshape(shape), z["gate"])
    close(routing.probs_NE.reshape(z["probs"].shape), z["probs"])
    close(dx, z["grad_x_of_sum_gate_R"])
    close(dw, z["grad_w_of_sum_gate_R"])
    if int(z["training"]):
        close(balance.gate_sums(routing), z["importance"])
        close(balance.smooth_load_mixed_spaces(routing), z["load"])
        close(balance.importance_loss(routing), z["cv2_importance"])
        close(balance.load_loss_mixed_spaces(routing), z["cv2_load"])
        value, (dx, dw) = jax.jit(jax.value_and_grad(loss, (0, 1)))(*args)
        close(value, z["loss"])
        close(dx, z["grad_x_of_loss"])
        close(dw, z["grad_w_of_loss"])


def test_losses_of_two_passes_add_up() -> None:
    z = under(load("m3vit", "gate_vmoe"), "accumulate/")
    total = 0.0
    for x, expected in (("x1", "loss_after_first"), ("x2", "loss_after_second")):
        total += reference_loss(route(z[x] @ z["w_gate"], k=int(z["top_k"])))
        close(total, z[expected])
    close(0.01 * total, z["collected_x0p01"])


def test_task_range() -> None:
    z = under(load("m3vit", "gate_vmoe"), "taskrange/")
    k, size = int(z["top_k"]), int(z["num_experts_pertask"])
    logits_NE = jnp.asarray(z["x"] @ z["w_gate"])
    assert len(z["start_ids"]) == sum(key.endswith("_idx") for key in z)
    for task, start in enumerate(map(int, z["start_ids"])):
        support_E = expert_range(start, size, logits_NE.shape[1])
        routing = route(logits_NE, k=k, support_NE=support_E)
        np.testing.assert_array_equal(routing.experts_NK - start, z[f"task{task}_idx"])
        close(routing.weights_NK, z[f"task{task}_gate"])
        inside = route(logits_NE[:, start : start + size], k=k)
        np.testing.assert_array_equal(inside.experts_NK, z[f"task{task}_idx"])
        close(reference_loss(inside), z[f"task{task}_loss"])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_gate_noisy(mode: str) -> None:
    z = under(load("m3vit", "gate_noisy"), f"{mode}/")
    training = mode == "train"

    def loss(w_gate: Array, w_noise: Array):
        routing = route(
            z["x"] @ w_gate,
            k=int(z["top_k"]),
            select=top_k_then_softmax,
            noise=learned_noise(z["x"] @ w_noise),
            eps_NE=jnp.asarray(z["noise"]) if training else None,
        )
        return balance.importance_loss(routing) + balance.load_loss(routing), routing

    args = (jnp.asarray(z["w_gate"]), jnp.asarray(z["w_noise"]))
    (value, routing), (dw, dw_noise) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        *args
    )
    np.testing.assert_array_equal(routing.experts_NK, z["idx"])
    close(routing.weights_NK, z["gate"])
    close(routing.noisy_NE, z["logits"])
    if training:
        close(balance.gate_sums(routing), z["importance"])
        close(balance.smooth_load(routing), z["load"])
        close(balance.importance_loss(routing), z["cv2_importance"])
        close(balance.load_loss(routing), z["cv2_load"])
        close(value, z["loss"])
        close(dw, z["grad_w_gate_of_loss"])
        close(dw_noise, z["grad_w_noise_of_loss"])


def test_cv_squared() -> None:
    z = load("m3vit", "cv_squared")
    vectors = [key for key in z if key.startswith("x")]
    assert vectors
    for key in vectors:
        close(balance.cv_squared(jnp.asarray(z[key])), z[f"cv2_{key[1:]}"])


def mlp(params: dict[str, Array], x: Array, linear: ExpertLinear) -> Array:
    hidden = linear(x, params["w1"], params["b1"])
    return linear(jax.nn.gelu(hidden, approximate=False), params["w2"], params["b2"])


def experts_of(z: dict[str, np.ndarray], prefix: str) -> dict[str, Array]:
    """Stacked expert parameters, matrices as [E, in, out]."""
    w = under(z, f"{prefix}experts.")
    return {
        "w1": jnp.asarray(w["htoh4.weight"]).swapaxes(1, 2),
        "b1": jnp.asarray(w["htoh4.bias"]),
        "w2": jnp.asarray(w["h4toh.weight"]).swapaxes(1, 2),
        "b2": jnp.asarray(w["h4toh.bias"]),
    }


def tokens_of(x: Any) -> Array:
    return jnp.asarray(x).reshape(-1, x.shape[-1])


@pytest.mark.parametrize("name", DROPLESS)
def test_moe_layer(name: str) -> None:
    z = load("m3vit", "moe_layer")
    k, x_ND = int(z["top_k"]), tokens_of(z["x"])
    apply = jax.jit(BACKENDS[name], static_argnums=0)

    def layer(prefix: str, routing: Routing) -> np.ndarray:
        y_ND = apply(mlp, experts_of(z, prefix), x_ND, routing).y_ND
        return np.asarray(y_ND).reshape(z["x"].shape)

    single = route(x_ND @ z["single/w/gate.w_gate"], k=k)
    np.testing.assert_array_equal(single.experts_NK, z["single/idx"])
    np.testing.assert_array_equal(balance.choice_counts(single), z["single/expert_counts"])
    close(single.weights_NK, z["single/gate"])
    close(layer("single/w/", single), z["single/y"])
    for key in (key for key in z if key.startswith("prune/y_thr")):
        pruned = drop_small_weights(single, float(key.removeprefix("prune/y_thr")))
        close(layer("single/w/", pruned), z[key])
    ahead = route(tokens_of(z["gateinp/gate_inp"]) @ z["single/w/gate.w_gate"], k=k)
    close(layer("single/w/", ahead), z["gateinp/y"])
    for key in (key for key in z if key.startswith("multi/y_task")):
        task = key.removeprefix("multi/y_task")
        routing = route(x_ND @ z[f"multi/w/gate.{task}.w_gate"], k=k)
        np.testing.assert_array_equal(routing.experts_NK, z[f"multi/idx_task{task}"])
        close(routing.weights_NK, z[f"multi/gate_task{task}"])
        close(layer("multi/w/", routing), z[key])
    for key in (key for key in z if key.startswith("taskcond/y_task")):
        task = key.removeprefix("taskcond/y_task")
        feature = jnp.tile(z[f"taskcond/task_feature{task}"], (x_ND.shape[0], 1))
        seen = jnp.concatenate([x_ND, feature], axis=1)
        routing = route(seen @ z["taskcond/w/gate.w_gate"], k=k)
        np.testing.assert_array_equal(routing.experts_NK, z[f"taskcond/idx_task{task}"])
        close(routing.weights_NK, z[f"taskcond/gate_task{task}"])
        close(layer("taskcond/w/", routing), z[key])


@pytest.mark.parametrize("name", DROPLESS)
def test_moe_layer_gradients(name: str) -> None:
    z = load("m3vit", "moe_layer")
    k, r_ND = int(z["top_k"]), tokens_of(z["train0/R"])

    def loss(x: Array, w_gate: Array, params: dict[str, Array]):
        x_ND = tokens_of(x)
        routing = route(x_ND @ w_gate, k=k)
        y_ND = BACKENDS[name](mlp, params, x_ND, routing).y_ND
        penalty = 0.01 * reference_loss(routing)
        return jnp.sum(y_ND * r_ND) + penalty, (y_ND, penalty)

    args = (jnp.asarray(z["x"]), jnp.asarray(z["single/w/gate.w_gate"]), experts_of(z, "single/w/"))
    (total, (y_ND, penalty)), (dx, dw_gate, dparams) = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    )(*args)
    close(total, z["train0/L"])
    close(penalty, z["train0/balance_x0p01"])
    close(y_ND.reshape(z["train0/y"].shape), z["train0/y"])
    close(dx, z["train0/grad_x"])
    close(dw_gate, z["train0/grad/gate.w_gate"])
    for key, expected in experts_of(z, "train0/grad/").items():
        close(dparams[key], expected)
