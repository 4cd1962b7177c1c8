"""V-MoE's routers, losses, capacity rule and dispatchers, number by number."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from moezoo.errors import UserError
from moezoo.ops.capacity import Priority, by_position, capacity, capacity_slots, expert_capacity
from moezoo.ops.dispatch import Slots, combine, spread
from moezoo.ops.expert import Applied, dense
from moezoo.ops.grouped import reference
from moezoo.ops.routing import Routing, constant_noise, no_noise, route, softmax_then_top_k
from tests.fixtures import folder, load
from tests.parity.vmoe import (
    PRIORITY,
    ROUNDING,
    buffers_of_reference,
    close,
    scaled,
    slots_of,
    vmoe_losses,
)

ROUTERS = [
    "router_det_k1",
    "router_det_k2",
    "router_noisy_k1",
    "router_noisy_k2",
    "router_noisy_k2_std0p5",
]
DISPATCHERS = [
    "dispatch_cap2_k2_GnotmultE",
    "dispatch_cap3_k1_GmultE",
    "dispatch_cf1p05_mult4_k2",
    "dispatch_cf0p5_round_mult1_k2",
]


def slot_weights(routing: Routing, slot_NK: Array, slots: int) -> Array:
    """Weights as [N, E, C]: the value of a choice at its expert and slot, 0 elsewhere."""
    experts = routing.logits_NE.shape[-1]
    at_NKS = (slot_NK[..., None] == jnp.arange(experts * slots)) * routing.weights_NK[..., None]
    return at_NKS.sum(axis=1).reshape(-1, experts, slots)


def route_group(z: dict[str, np.ndarray], logits_NE: Array, eps_NE: Array | None) -> Routing:
    """The routing of one group; deterministic fixtures hold no noise."""
    std, k = float(z["noise_std"]), int(z["num_selected_experts"])
    return route(logits_NE, k=k, noise=constant_noise(std), eps_NE=eps_NE)


@pytest.mark.parametrize("name", ROUTERS)
def test_router(name: str) -> None:
    z = load("vmoe", name)
    noisy = not int(z["deterministic"])
    weight = {key: float(z[f"{key}_loss_weight"]) for key in ("importance", "load", "gshard")}
    weight["load"] *= noisy
    _, tokens, experts = z["logits"].shape
    choices = tokens * int(z["num_selected_experts"])
    slots = expert_capacity(choices, experts, 1.0, math.ceil, multiple_of=4)

    def group(kernel: Array, x_ND: Array, eps_NE: Array | None):
        routing = route_group(z, x_ND @ kernel, eps_NE)
        losses = vmoe_losses(routing)
        losses["auxiliary"] = sum(weight[key] * losses[key] for key in weight)
        plan = capacity_slots(routing, experts, slots, by_position)
        return losses["auxiliary"], (routing, losses, slot_weights(routing, plan.slot_NK, slots))

    def total(kernel: Array):
        auxiliary_G, rest = jax.vmap(group, in_axes=(None, 0, 0))(kernel, z["x"], z.get("eps"))
        return jnp.sum(auxiliary_G), rest

    (_, (routing, losses, kept)), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(
        jnp.asarray(z["kernel"])
    )
    close(routing.logits_NE, z["logits"])
    close(routing.probs_NE, z["gates_used"])
    if noisy:
        close(routing.noisy_NE, z["logits_noisy"])
        close(losses["load"], z["load_loss"])
    close(losses["importance"], z["importance_loss"])
    close(losses["gshard"], z["gshard_loss"])
    close(losses["auxiliary"], z["auxiliary_loss"])
    close(kept, z["combine_weights"])
    np.testing.assert_array_equal(np.asarray(kept) > 0, z["dispatch_weights"])
    close(grad, z["grad_kernel_of_sum_auxiliary_loss"])


def test_compute_capacity() -> None:
    table = json.loads((folder("vmoe") / "compute_capacity.json").read_text())
    assert table["rows"]
    for row in table["rows"]:
        case = dict(zip(table["columns"], row, strict=True))
        args = (case["num_tokens"], case["num_experts"], case["capacity_factor"])
        rule = (ROUNDING[case["ceil_or_round"]], case["multiple_of"] or 1)
        if case["capacity"] is None:
            with pytest.raises(UserError, match="capacity"):
                expert_capacity(*args, *rule)
        else:
            assert expert_capacity(*args, *rule) == case["capacity"], case


def routing_of_gates(gates_NE: Array, k: int) -> Routing:
    """A routing whose probabilities are `gates_NE` (rows sum to 1)."""
    return route(jnp.log(gates_NE), k=k, select=softmax_then_top_k, noise=no_noise)


class Dispatched(NamedTuple):
    """What the dispatch tests look at, each with a leading axis of groups."""

    routing: Routing
    plan: Slots
    kept: Array
    buffers: Array
    applied: Applied
    in_bfloat16: Array
    by_all_experts: Array


def dispatch_all(z: dict[str, np.ndarray], slots: int, priority: Priority) -> Dispatched:
    k, experts = int(z["num_selected_experts"]), z["gates"].shape[-1]
    params_E = jnp.arange(experts, dtype=jnp.float32)

    def group(gates_NE: Array, x_ND: Array) -> Dispatched:
        routing = routing_of_gates(gates_NE, k)
        plan = capacity_slots(routing, experts, slots, priority)
        return Dispatched(
            routing=routing,
            plan=plan,
            kept=slot_weights(routing, plan.slot_NK, slots),
            buffers=spread(x_ND, plan).reshape(experts, slots, -1),
            applied=capacity(slots=slots, priority=priority)(scaled, params_E, x_ND, routing),
            in_bfloat16=in_bfloat16(x_ND, routing, plan, params_E),
            by_all_experts=reference(
                scaled, params_E, x_ND, routing_of_gates(gates_NE, experts)
            ).y_ND,
        )

    return jax.jit(jax.vmap(group))(z["gates"], z["data"])


def in_bfloat16(x_ND: Array, routing: Routing, plan: Slots, params_E: Array) -> Array:
    """Buffers in bfloat16 on the way in and on the way out."""
    experts, d = params_E.shape[0], x_ND.shape[1]
    x_ECD = spread(x_ND.astype(jnp.bfloat16), plan).reshape(experts, -1, d)
    y_ECD = jax.vmap(lambda p, x: scaled(p, x, dense))(params_E, x_ECD.astype(jnp.float32))
    return combine(y_ECD.reshape(-1, d).astype(jnp.bfloat16), routing.weights_NK, plan)


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("bpr", [0, 1])
def test_dispatch(name: str, bpr: int) -> None:
    z = load("vmoe", name)
    _, tokens, experts = z["gates"].shape
    slots = slots_of(z, tokens * int(z["num_selected_experts"]), experts)
    assert slots == int(z["effective_capacity"])
    done = dispatch_all(z, slots, PRIORITY[bpr])
    equal = np.testing.assert_array_equal

    expected = z[f"indices_bpr{bpr}_indices"]
    kept = np.asarray(done.plan.slot_NK) >= 0
    equal(done.routing.experts_NK, expected[..., 0])
    equal(kept, expected[..., 1] < slots)
    equal((np.asarray(done.plan.slot_NK) % slots)[kept], expected[..., 1][kept])
    equal(kept.sum(axis=-1), z[f"bpr{bpr}_num_kept_choices_per_item"])
    equal(done.applied.dropped, (~kept).sum(axis=(1, 2)))
    close(done.routing.weights_NK, z[f"indices_bpr{bpr}_combine_weights"])
    close(done.kept, z[f"einsum_bpr{bpr}_combine_weights"])
    equal(np.asarray(done.kept) > 0, z[f"einsum_bpr{bpr}_dispatch_weights"])
    close(done.by_all_experts, z["dense_combined"])

    buffers = buffers_of_reference(np.asarray(done.buffers))
    for kind in ("einsum", "indices"):
        close(buffers, z[f"{kind}_bpr{bpr}_dispatched"])
        close(done.applied.y_ND, z[f"{kind}_bpr{bpr}_combined"])
        rounded = z[f"{kind}_bpr{bpr}_bf16_combined"]
        np.testing.assert_allclose(done.in_bfloat16, rounded, rtol=1e-2, atol=1e-2)
