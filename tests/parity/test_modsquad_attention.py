"""Mod-Squad's attention experts and its two kinds of block."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.vit import Block
from moezoo.nn import module
from moezoo.nn.attention import Attention
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import MLP
from moezoo.nn.moa import HeadExperts, MoA, keys_and_values
from moezoo.nn.moe import MoE
from moezoo.nn.routers import MultiGateRouter
from moezoo.ops import balance, grouped
from moezoo.ops.expert import Backend
from moezoo.ops.selection import smoothed_softmax_then_top_k
from tests.fixtures import load, under
from tests.parity.test_modsquad_layers import gates
from tests.parity.vmoe import close

SMOOTHING = 1e-4
EPSILON = 1e-5  # of the fixtures' LayerNorms; the published models have 1e-6


def linear(values: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"kernel": values[f"{name}.weight"].T, "bias": values[f"{name}.bias"]}


def norm(values: dict[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    return {"scale": values[f"{name}.weight"], "bias": values[f"{name}.bias"]}


def router_of(values: dict[str, np.ndarray], k: int) -> MultiGateRouter:
    tasks, width, experts = gates(values).shape
    rngs = nnx.Rngs(0)
    return MultiGateRouter(tasks, width, experts, k, select=smoothed_softmax_then_top_k, rngs=rngs)


def moa(values: dict[str, np.ndarray], k: int, backend: Backend) -> MoA:
    experts, width, head_width = values["q_proj.experts.w"].shape
    heads = HeadExperts(experts, width, head_width, rngs=nnx.Rngs(0))
    router = router_of(under(values, "q_proj."), k)
    return MoA(router, heads, backend, keys_and_values(heads, nnx.Rngs(0)))


def moa_params(values: dict[str, np.ndarray]) -> dict[str, Any]:
    query, out = values["q_proj.experts.w"], values["q_proj.output_experts.w"]
    return {
        "experts": {"query": {"kernel": query}, "out": {"kernel": out}},
        "router": {"kernel": gates(under(values, "q_proj."))},
        "kv": linear(values, "kv_proj.0"),
    }


def with_params(made: nnx.Module, params: dict[str, Any]) -> Any:
    parts = module.split(made)
    given = jax.tree.map(jnp.asarray, params)
    assert jax.tree.map(jnp.shape, given) == jax.tree.map(jnp.shape, parts.params)
    return module.merge(parts.definition, given, parts.stats)


def conditions(y_per_task: np.ndarray) -> Context:
    """All tasks in one batch, the rows of a task beside each other."""
    tasks, batch = y_per_task.shape[:2]
    return Context(jnp.repeat(jnp.arange(tasks), batch))


@pytest.mark.parametrize("backend", ["reference", "blocks", "ragged"])
def test_attention_experts(backend: str) -> None:
    z = load("modsquad", "moa_attention")
    values, k = under(z, "param/"), int(z["num_heads_k"])
    layer = with_params(moa(values, k, grouped.by_name(backend)), moa_params(values))
    assert layer.experts.query.kernel.shape[2] == int(z["head_dim"])
    tasks = len(z["y_per_task"])
    x_BTD = jnp.tile(jnp.asarray(z["x"]), (tasks, 1, 1))
    y_ND, record = jax.jit(lambda m, x: m(x, conditions(z["y_per_task"])))(layer, x_BTD)
    close(y_ND.reshape(z["y_per_task"].shape), z["y_per_task"])
    mi = balance.mutual_information_loss_smoothed(record.routing, record.task_N, tasks, SMOOTHING)
    close(0.005 * mi, z["aux_loss"])
    assert int(record.dropped) == 0


def test_one_task_alone() -> None:
    z = load("modsquad", "moa_attention")
    values, k = under(z, "param/"), int(z["num_heads_k"])
    layer = with_params(moa(values, k, grouped.blocks), moa_params(values))
    for task, expected in enumerate(z["y_per_task"]):
        y_ND = layer(jnp.asarray(z["x"]), Context(task)).y_ND
        close(y_ND.reshape(expected.shape), expected)


def run_block(block: Block, z: dict[str, np.ndarray]) -> None:
    block.norm1.epsilon = block.norm2.epsilon = EPSILON
    condition = conditions(z["y_per_task"])

    def run(block: Block, x_BTD: jax.Array) -> tuple:
        x_BTD, looked = block.attend(x_BTD, condition)
        y_BTD, fed = block.feed(x_BTD, block.norm2(x_BTD), x_BTD, condition)
        return y_BTD, looked, fed

    x_BTD = jnp.tile(jnp.asarray(z["x"]), (len(z["y_per_task"]), 1, 1))
    y_BTD, looked, fed = jax.jit(run)(block, x_BTD)
    close(y_BTD.reshape(z["y_per_task"].shape), z["y_per_task"])
    assert (looked is None) != (fed is None)


HEADS = 2  # of both blocks, as the fixtures' description says


def test_block_with_attention_experts() -> None:
    z = load("modsquad", "block_attn_moe")
    values = under(z, "param/")
    hidden, width = values["mlp.fc1.weight"].shape
    attn = under(values, "attn.")
    block = Block(
        width,
        HEADS,
        MLP(width, hidden, rngs=nnx.Rngs(0)),
        attn=moa(attn, HEADS, grouped.blocks),
        rngs=nnx.Rngs(0),
    )
    params = {
        "norm1": norm(values, "norm1"),
        "norm2": norm(values, "norm2"),
        "attn": moa_params(attn),
        "mlp": {"fc1": linear(values, "mlp.fc1"), "fc2": linear(values, "mlp.fc2")},
    }
    run_block(with_params(block, params), z)


def test_block_with_mlp_experts() -> None:
    z = load("modsquad", "block_ffn_moe")
    values = under(z, "param/")
    mlp = under(values, "mlp.")
    experts, width, hidden = mlp["experts.w"].shape
    inner = values["attn.proj.weight"].shape[1]
    rngs = nnx.Rngs(0)
    block = Block(
        width,
        HEADS,
        MoE(router_of(mlp, 2), MLPExperts(experts, width, hidden, rngs=rngs), grouped.blocks),
        attn=Attention(width, HEADS, head_width=inner // HEADS, rngs=rngs),
        rngs=rngs,
    )
    fc1 = {"kernel": mlp["experts.w"], "bias": mlp["experts.b"]}
    fc2 = {"kernel": mlp["output_experts.w"], "bias": mlp["output_experts.b"]}
    params = {
        "norm1": norm(values, "norm1"),
        "norm2": norm(values, "norm2"),
        "attn": {"qkv": linear(values, "attn.qkv"), "proj": linear(values, "attn.proj")},
        "mlp": {
            "experts": {"fc1": fc1, "fc2": fc2},
            "router": {"kernel": gates(mlp)},
        },
    }
    run_block(with_params(block, params), z)
