"""Soft MoE and the ensemble router of the V-MoE code base, number by number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from moezoo.nn.batch_routers import EnsembleRouter
from moezoo.nn.context import NO_TASK
from moezoo.nn.soft import SoftRouter
from moezoo.ops import balance
from moezoo.ops.capacity import by_position, capacity_slots, expert_capacity
from moezoo.ops.expert import ExpertFn, ExpertLinear
from moezoo.ops.groups import by_member
from moezoo.ops.routing import Routing
from moezoo.ops.soft import SoftRouting, similarity, soft_apply, soft_route
from tests.fixtures import load, text, under
from tests.parity.test_vmoe import slot_weights
from tests.parity.test_vmoe_layers import mlp
from tests.parity.vmoe import buffers_of_reference, close, scaled


def in_bfloat16(fn: ExpertFn) -> ExpertFn:
    """The expert's outputs pass through bfloat16, as everything does in the reference."""

    def rounded(params: Any, x: Array, linear: ExpertLinear) -> Array:
        return fn(params, x, linear).astype(jnp.bfloat16).astype(x.dtype)

    return rounded


def rounded(x: Array) -> Array:
    return x.astype(jnp.bfloat16).astype(jnp.float32)


def route_fixture(z: dict[str, np.ndarray]) -> SoftRouting:
    eps = None if int(z["deterministic"]) else jnp.asarray(z["eps"])
    x_BTD, mu_DES, scale = (jnp.asarray(z[key]) for key in ("x", "mu", "scale"))
    return soft_route(x_BTD, mu_DES, scale, noise_std=float(z["noise_std"]), eps_BTES=eps)


@pytest.mark.parametrize("name", ["soft_moe_p1", "soft_moe_cf1", "soft_moe_noise"])
def test_soft_moe(name: str) -> None:
    z = load("vmoe", name)
    tokens = z["x"].shape[1]
    _, experts, slots = z["mu"].shape
    assert slots == int(z["num_slots"])
    if (factor := float(z["capacity_factor"])) > 0:
        assert slots == expert_capacity(tokens, experts, factor, round)
    params_E, x_BTD = jnp.arange(experts, dtype=jnp.float32), jnp.asarray(z["x"])

    @jax.jit
    def run(x_BTD: Array) -> tuple[SoftRouting, Array, Array]:
        routing = route_fixture(z)
        y_BTD = soft_apply(scaled, params_E, x_BTD, routing)
        return routing, y_BTD, soft_apply(in_bfloat16(scaled), params_E, rounded(x_BTD), routing)

    routing, y_BTD, through_bfloat16 = run(x_BTD)
    close(routing.dispatch_BTES, z["dispatch_weights"])
    close(routing.combine_BTES, z["combine_weights"])
    close(y_BTD, z["combined_f32"])
    wrapped = z["combined_bf16_wrapper"]
    np.testing.assert_allclose(through_bfloat16, wrapped, rtol=1e-2, atol=1e-2)

    slots_BESD = np.einsum("btes,btd->besd", routing.dispatch_BTES, z["x"])
    close(buffers_of_reference(slots_BESD), z["dispatched_f32"])
    check_metrics(under(z, "metric_"), routing, z["mu"])


def check_metrics(metric: dict[str, np.ndarray], routing: SoftRouting, mu_DES: np.ndarray) -> None:
    b, t, e, s = routing.combine_BTES.shape
    combine_BTX = routing.combine_BTES.reshape(b, t, e * s)
    dispatch_BXT = routing.dispatch_BTES.reshape(b, t, e * s).swapaxes(1, 2)
    rows = {"combine_weights": combine_BTX, "dispatch_weights": dispatch_BXT}
    for name, weights in rows.items():
        close(weights.min(axis=2).mean(), metric[f"{name}_min_mean"])
        close(weights.max(axis=2).mean(), metric[f"{name}_max_mean"])
    rows["mu"] = jnp.asarray(mu_DES).reshape(1, -1, e * s).swapaxes(1, 2)
    for name, vectors in rows.items():
        least, most, mean = similarity(vectors)
        close(least, metric[f"{name}_similarity_min"])
        close(jnp.maximum(most, 0.0), metric[f"{name}_similarity_max"])
        close(mean, metric[f"{name}_similarity_mean"])
    assert float(metric["auxiliary_loss"]) == 0.0


def test_whole_soft_block() -> None:
    z = load("vmoe", "mlp_moe_soft")
    config: dict[str, Any] = text(z["router_json"])  # type: ignore[assignment]
    size, experts = int(z["group_size"]), int(z["num_experts"])
    x_BTD = jnp.asarray(z["x"]).reshape(-1, size, z["x"].shape[-1])
    params = {key: jnp.asarray(value) for key, value in under(z, "param/").items()}
    slots = config["num_slots"] or expert_capacity(size, experts, config["capacity_factor"], round)
    assert params["Router/mu"].shape[1:] == (experts, slots)

    def loss(params: Any) -> tuple[Array, Array]:
        routing = soft_route(x_BTD, params["Router/mu"], params["Router/scale"])
        y_BTD = soft_apply(in_bfloat16(mlp), under(params, "Mlp/"), rounded(x_BTD), routing)
        return jnp.mean(y_BTD**2), y_BTD

    (total, y_BTD), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    near = {"rtol": 1e-2, "atol": 1e-4}
    np.testing.assert_allclose(y_BTD.reshape(z["y"].shape), z["y"], rtol=1e-2, atol=2e-3)
    np.testing.assert_allclose(total, z["loss"], **near)
    expected = under(z, "grad/")
    assert expected.keys() == grads.keys() and not np.any(z["auxiliary_loss"])
    for key, value in expected.items():
        np.testing.assert_allclose(grads[key], value, err_msg=key, **near)


def test_soft_router_module_is_the_function() -> None:
    z = load("vmoe", "soft_moe_cf1")
    router = SoftRouter(*z["mu"].shape, rngs=nnx.Rngs(0))
    router.kernel.set_value(jnp.asarray(z["mu"]))
    router.scale.set_value(jnp.asarray(z["scale"]))
    close(router(jnp.asarray(z["x"])).combine_BTES, z["combine_weights"])


def test_ensemble_router() -> None:
    z = load("vmoe", "ensemble_router_m2")
    d, members, block = z["kernel"].shape
    assert members == int(z["ensemble_size"])
    k, experts = int(z["num_selected_experts"]), members * block
    router = EnsembleRouter(d, experts, k, members=members, rngs=nnx.Rngs(0))
    router.kernel.set_value(jnp.asarray(z["kernel"]).reshape(d, experts))
    slots = z["combine_weights"].shape[-1]
    assert slots == expert_capacity(z["x"].shape[1] * k, experts, 1.0, multiple_of=4)

    def group(x_ND: Array) -> tuple[Array, Array]:
        routing = router(x_ND, NO_TASK)
        plan = capacity_slots(routing, experts, slots, by_position)
        return slot_weights(routing, plan.slot_NK, slots), jax.vmap(importance)(
            by_member(routing, members)
        )

    kept, importance_GM = jax.jit(jax.vmap(group))(jnp.asarray(z["x"]))
    close(kept, z["combine_weights"])
    np.testing.assert_array_equal(np.asarray(kept) > 0, z["combine_weights"] > 0)
    close(importance_GM, z["importance_loss"])
    close(0.005 * importance_GM, z["auxiliary_loss"])


def importance(routing: Routing) -> Array:
    return balance.importance_loss(routing, balance.prob_sums, balance.cv_squared_population)
