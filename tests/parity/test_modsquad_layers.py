"""Mod-Squad's task-gated layer: outputs, statistics, every regulariser and their gradients."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import Array

from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.moe import MoE, Record
from moezoo.nn.routers import MultiGateRouter, NoisyMultiGateRouter
from moezoo.ops import balance
from moezoo.ops.grouped import reference
from moezoo.ops.routing import Routing, only, route
from moezoo.ops.selection import smoothed_softmax_then_top_k
from tests.fixtures import load, under
from tests.parity.vmoe import close

SMOOTHING = 1e-4


def gates(values: dict[str, np.ndarray]) -> np.ndarray:
    """The tasks' gate matrices as [J, D, rows]."""
    tasks = sum(key.startswith("f_gate.") for key in values)
    return np.stack([values[f"f_gate.{t}.0.weight"].T for t in range(tasks)])


def tree(values: dict[str, np.ndarray]) -> dict[str, Any]:
    """Reference arrays (weights or gradients) in the structure of a layer's parameters."""
    parts = {
        "fc1": {"kernel": values["experts.w"], "bias": values["experts.b"]},
        "fc2": {"kernel": values["output_experts.w"], "bias": values["output_experts.b"]},
    }
    return {"experts": parts, "router": {"kernel": gates(values)}}


def layer(values: dict[str, np.ndarray], k: int) -> MoE:
    kernel_JDE = gates(values)
    experts, width, hidden = values["experts.w"].shape
    make = NoisyMultiGateRouter if kernel_JDE.shape[2] == 2 * experts else MultiGateRouter
    router = make(
        kernel_JDE.shape[0],
        width,
        experts,
        k,
        select=smoothed_softmax_then_top_k,
        rngs=nnx.Rngs(0),
    )
    return MoE(router, MLPExperts(experts, width, hidden, rngs=nnx.Rngs(0)), reference)


def auxiliary(routing: Routing, task_N: Array, tasks: int, weight: dict[str, float]) -> Array:
    """The regularisers in use, by the names of the reference's coefficients."""
    terms = {
        "w_MI": lambda: balance.mutual_information_loss_smoothed(routing, task_N, tasks),
        "cvloss": lambda: balance.importance_loss(routing),
        "switchloss": lambda: balance.switch_loss_of_choices(routing, SMOOTHING),
        "zloss": lambda: balance.z_loss(routing, SMOOTHING),
    }
    return sum((w * terms[name]() for name, w in weight.items()), jnp.zeros(()))


@pytest.mark.parametrize("name", ["task_moe_ffn_mi", "task_moe_ffn_all_terms"])
def test_task_moe(name: str) -> None:
    z = load("modsquad", name)
    values, k = under(z, "param/"), int(z["k"])
    tasks, batch, tokens, d = z["y_per_task"].shape
    moe = layer(values, k)
    definition, _, stats = module.split(moe)
    task_B = jnp.repeat(jnp.arange(tasks), batch)
    x_ND = jnp.tile(jnp.asarray(z["x"]), (tasks, 1, 1)).reshape(-1, d)
    weight = {key: float(value) for key, value in under(z, "coef/").items()}

    def forward(params: Any) -> tuple[Array, Record]:
        return module.merge(definition, params, stats)(x_ND, Context(task_B))

    def losses(params: Any) -> tuple[Array, tuple[Array, Array, Record]]:
        y_ND, record = forward(params)
        aux = auxiliary(record.routing, record.task_N, tasks, weight)
        return jnp.sum(jnp.mean(y_ND.reshape(tasks, -1) ** 2, axis=1)) + aux, (aux, y_ND, record)

    params = jax.tree.map(jnp.asarray, tree(values))
    run = jax.jit(jax.value_and_grad(losses, has_aux=True))
    (_, (aux, y_ND, record)), grads = run(params)
    close(y_ND.reshape(z["y_per_task"].shape), z["y_per_task"])
    close(aux, z["aux_loss"])
    jax.tree.map(close, grads, tree(under(z, "grad_total/")))
    of_aux = jax.jit(jax.grad(lambda p: losses(p)[1][0]))(params)
    close(of_aux["router"]["kernel"], gates(under(z, "grad_aux/")))
    check_statistics(z, record, tasks)


def check_statistics(z: dict[str, np.ndarray], record: Record, tasks: int) -> None:
    routing, task_N, acc = record.routing, record.task_N, under(z, "acc/")
    n = routing.mask_N.shape[0]
    probs_NE = routing.probs_NE + SMOOTHING
    close(probs_NE.reshape(z["probs_plus_1em4"].shape), z["probs_plus_1em4"])
    counts_JE = np.stack(
        [balance.choice_counts(only(routing, task_N == task)) for task in range(tasks)]
    )
    np.testing.assert_array_equal(counts_JE, z["expert_size_per_task"])
    sums_JE = balance.task_expert_sums(routing, task_N, tasks, SMOOTHING)
    close(sums_JE, acc["MI_task_gate"])
    close(sums_JE.sum(axis=0), acc["acc_probs"])
    close(sums_JE.sum(axis=0) / (n // tasks), acc["topk_acc_probs"])
    close(balance.gate_sums(routing), acc["acc_gates"])
    np.testing.assert_array_equal(balance.choice_counts(routing), acc["acc_freq"])
    close(balance.z_loss(routing, SMOOTHING) * n, acc["acc_lsesq"])
    assert n == int(acc["acc_lsesq_count"])
    close(0.05 * counts_JE, acc["task_gate_freq"])
    if "topk_loss" in z:
        free = int(z["limit_k"])
        loss = balance.few_experts_loss(routing, task_N, tasks, free, SMOOTHING)
        close(float(z["w_topk"]) * loss, z["topk_loss"])


def test_noisy_gate() -> None:
    z = load("modsquad", "task_moe_ffn_noisy_task1")
    values, k, here = under(z, "param/"), int(z["k"]), Context(1)
    moe, experts = layer(values, k), values["experts.w"].shape[0]
    router: Any = moe.router
    kernel_JDR = jnp.asarray(gates(values))
    module_of = module.split(moe)
    params = jax.tree.map(jnp.asarray, tree(values))
    params["router"]["kernel"] = kernel_JDR[..., :experts]
    params["router"]["noise_kernel"] = kernel_JDR[..., experts:]
    moe = module.merge(module_of.definition, params, module_of.stats)
    router = moe.router
    x_ND = jnp.asarray(z["x"]).reshape(-1, z["x"].shape[-1])
    routing = route(
        router.logits(x_ND, here),
        k=k,
        select=router.select,
        noise=router.noise_for(x_ND, here),
        eps_NE=jnp.asarray(z["eps"]),
    )
    close(moe.mix(x_ND, routing, here).y_ND.reshape(z["y"].shape), z["y"])
    np.testing.assert_array_equal(balance.choice_counts(routing), z["expert_size"])
    # The reference measures z on the logits with their noise.
    noisy = routing._replace(logits_NE=routing.noisy_NE)
    aux = 0.001 * balance.z_loss(noisy, SMOOTHING)
    aux += 0.01 * balance.switch_loss_of_choices(noisy, SMOOTHING)
    close(aux, z["aux_loss"])
    alone = router.of_task(1)
    np.testing.assert_array_equal(alone.logits(x_ND, here), router.logits(x_ND, here))
    of_all, of_one = (r.noise_for(x_ND, here) for r in (router, alone))
    nothing = (jnp.zeros(()), jnp.zeros(()), jnp.ones(()))
    np.testing.assert_array_equal(of_one(*nothing).scale_NE, of_all(*nothing).scale_NE)


def test_mutual_information_of_arbitrary_rows() -> None:
    z = load("modsquad", "mi_loss_only")
    k, tasks = int(z["k"]), z["task_expert_matrix"].shape[0]
    rows = [z[f"logits_task{t}"] for t in range(tasks)]
    assert f"logits_task{tasks}" not in z
    task_N = jnp.repeat(jnp.arange(tasks), jnp.asarray([len(r) for r in rows]))
    logits_NE = jnp.concatenate(rows)

    def loss(logits_NE: Array) -> tuple[Array, Routing]:
        routing = route(logits_NE, k=k, select=smoothed_softmax_then_top_k)
        value = balance.mutual_information_loss_smoothed(routing, task_N, tasks)
        return value, routing

    (value, routing), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits_NE)
    close(value, z["mi_loss"])
    close(grad, np.concatenate([z[f"grad_logits_task{t}"] for t in range(tasks)]))
    sums_JE = balance.task_expert_sums(routing, task_N, tasks, SMOOTHING)
    close(sums_JE, z["task_expert_matrix"])
    assert int(balance.choice_counts(routing).sum()) / k == float(z["total_tokens"])
