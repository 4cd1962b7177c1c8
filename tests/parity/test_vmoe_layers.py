"""V-MoE: experts that choose their tokens, and whole MoE blocks with their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moezoo.ops.capacity import capacity, expert_capacity
from moezoo.ops.expert import ExpertLinear
from moezoo.ops.grouped import reference
from moezoo.ops.routing import constant_noise, experts_choose, no_noise, route
from tests.fixtures import load, text, under
from tests.parity.vmoe import (
    PRIORITY,
    ROUNDING,
    buffers_of_reference,
    close,
    scaled,
    slots_of,
    vmoe_losses,
)


@pytest.mark.parametrize("name", ["experts_choose_cf1", "experts_choose_noisy_cap3"])
def test_experts_choose(name: str) -> None:
    z = load("vmoe", name)
    _, tokens, experts = z["eps"].shape
    slots = slots_of(z, tokens, experts)
    noise = no_noise if int(z["deterministic"]) else constant_noise(float(z["noise_std"]))
    params_E = jnp.arange(experts, dtype=jnp.float32)

    def group(x_ND: Array, eps_NE: Array):
        choice = experts_choose(x_ND @ z["kernel"], slots=slots, noise=noise, eps_NE=eps_NE)
        applied = capacity(slots=slots)(scaled, params_E, x_ND, choice.routing)
        return choice, applied, reference(scaled, params_E, x_ND, choice.routing).y_ND

    choice, applied, by_all = jax.jit(jax.vmap(group))(z["x"], z["eps"])
    at_GNEC = np.asarray(choice.tokens_EC)[:, None] == np.arange(tokens)[:, None, None]
    np.testing.assert_array_equal(at_GNEC, z["dispatch_weights"])
    close(at_GNEC * np.asarray(choice.weights_EC)[:, None], z["combine_weights"])
    assert not np.any(applied.dropped)
    close(applied.y_ND, z["combined"])
    close(by_all, z["combined"])
    slots_GECD = np.stack([x[rows] for x, rows in zip(z["x"], choice.tokens_EC, strict=True)])
    close(buffers_of_reference(slots_GECD), z["dispatched"])
    metric = under(z, "metric_")
    assert not np.any(metric["auxiliary_loss"])
    count_GN = np.sum(np.asarray(choice.routing.experts_NK) >= 0, axis=-1)
    np.testing.assert_array_equal(count_GN.max(axis=1), metric["num_experts_per_item_max"])
    np.testing.assert_array_equal(count_GN.min(axis=1), metric["num_experts_per_item_min"])
    close(np.max(choice.weights_EC, axis=(1, 2)), metric["max_selected_gate"])
    close(np.min(choice.weights_EC, axis=(1, 2)), metric["min_selected_gate"])
    for key, share_G in under(metric, "ratio_processed_items_by_at_least_").items():
        close((count_GN >= int(key.split("_")[0])).mean(axis=1), share_G)


def mlp(params: dict[str, Array], x: Array, linear: ExpertLinear) -> Array:
    hidden = linear(x, params["Dense_0/kernel"], params["Dense_0/bias"])
    hidden = jax.nn.gelu(hidden, approximate=True)
    return linear(hidden, params["Dense_1/kernel"], params["Dense_1/bias"])


def block_layer(z: dict[str, np.ndarray]) -> Callable[[Any, Array], tuple[Array, Array]]:
    """One group's layer of an `mlp_moe_*` fixture: (params, x_ND) -> (y_ND, auxiliary loss)."""
    router: dict[str, Any] = text(z["router_json"])  # type: ignore[assignment]
    tokens, experts = int(z["group_size"]), int(z["num_experts"])
    dispatch = router["dispatcher"]
    k = router.get("num_selected_experts", 1)
    slots = expert_capacity(
        tokens * k,
        experts,
        dispatch["capacity_factor"],
        ROUNDING[dispatch.get("capacity_ceil_or_round", "ceil")],
        dispatch.get("capacity_multiple_of") or 1,
    )
    backend = capacity(slots=slots, priority=PRIORITY[bool(dispatch.get("batch_priority"))])
    choosing = router.get("name") == "NoisyTopItemsPerExpertRouter"

    def layer(params: Any, x_ND: Array) -> tuple[Array, Array]:
        logits_NE = x_ND @ params["Router/dense/kernel"]
        if choosing:
            routing, loss = experts_choose(logits_NE, slots=slots).routing, jnp.zeros(())
        else:
            routing = route(logits_NE, k=k)
            loss = router["importance_loss_weight"] * vmoe_losses(routing)["importance"]
        return backend(mlp, under(params, "Mlp/"), x_ND, routing).y_ND, loss

    return layer


@pytest.mark.parametrize("name", ["mlp_moe_topk", "mlp_moe_bpr_cf0p5", "mlp_moe_experts_choose"])
def test_whole_block(name: str) -> None:
    z = load("vmoe", name)
    layer = block_layer(z)
    x_GND = jnp.asarray(z["x"]).reshape(-1, int(z["group_size"]), z["x"].shape[-1])
    params = {key: jnp.asarray(value) for key, value in under(z, "param/").items()}

    def loss(params: Any):
        y_GND, auxiliary_G = jax.vmap(layer, in_axes=(None, 0))(params, x_GND)
        return jnp.mean(y_GND**2) + jnp.mean(auxiliary_G), (y_GND, auxiliary_G)

    (total, (y_GND, auxiliary_G)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    close(y_GND.reshape(z["y"].shape), z["y"])
    close(total, z["loss"])
    close(auxiliary_G if z["auxiliary_loss"].ndim else auxiliary_G.mean(), z["auxiliary_loss"])
    expected = under(z, "grad/")
    assert expected.keys() == grads.keys()
    for key, value in expected.items():
        close(grads[key], value)
