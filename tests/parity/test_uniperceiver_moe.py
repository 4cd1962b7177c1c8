"""Uni-Perceiver-MoE: its gate at five levels, merged linear maps, the whole encoder layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.backbones.conditional import ConditionalBlock, ConditionalMake
from moezoo.models.conditional_moe.conditions import PUBLISHED, ConditionTable
from moezoo.nn import surgery
from moezoo.nn.attention import mean_token
from moezoo.nn.condition_routers import AttributeRouter, as_it_is
from moezoo.nn.conditional import ALL, ContextLevel, MergedLinear, RowLevel, TokenLevel
from moezoo.nn.context import Context
from moezoo.nn.exploration import Explore, ExploringRouter
from moezoo.nn.layers import gelu
from moezoo.ops import grouped
from moezoo.ops.routing import Noisy, Routing, constant_noise, route
from moezoo.ops.selection import (
    Selection,
    sampled_after,
    softmax_then_top_k,
    softmax_then_top_k_renormalised,
    softmax_weights_renormalised,
)
from moezoo.ops.weight_mixtures import WHOLE, Segments
from tests.fixtures import load, under

K = 2
ACTIVATIONS = {"noact": as_it_is, "gelu": gelu}
FILES = [f"gate_{kind}_{act}" for kind in ("attribute", "task_onehot", "modality_onehot")
         for act in ACTIVATIONS]  # fmt: skip


def router_of(file: dict, activation, k: int = K, **options) -> AttributeRouter:
    """The reference's parameters in ours; torch keeps matrices as (out, in)."""
    weights = under(under(file, "param/"), "tag_transform.")
    linear, norm = sorted({name.split(".")[0] for name in weights})
    kernel, wg = weights[f"{linear}.weight"].T, file["param/wg.weight"].T
    sizes = (*kernel.shape, wg.shape[1], k)
    router = AttributeRouter(*sizes, activation=activation, **options, rngs=nnx.Rngs(0))
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
    condition = Context(0, attributes_RA=jnp.asarray(file["cond"]))
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


def close(actual, expected) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_published_table() -> None:
    file, table = load("uniperceiver_moe", "attribute_table"), ConditionTable(PUBLISHED)
    assert set(table.names) == set(file)
    for name, rows in file.items():
        entry = table.entry(name)
        np.testing.assert_array_equal(entry.rows_RA, rows)
        assert entry.causal == bool(rows[-1, -1])


def test_gate_token() -> None:
    file = load("uniperceiver_moe", "gate_token")
    x_BTD, wg = jnp.asarray(file["tokens"]), file["param/wg.weight"].T
    select = softmax_then_top_k_renormalised
    router = ExploringRouter(*wg.shape, K, select=select, init=lambda *_: wg, rngs=nnx.Rngs(0))
    level = TokenLevel(router, grouped.reference)
    routing = level.decide(x_BTD, Context()).routing
    np.testing.assert_array_equal(level.seen(x_BTD, Context()).reshape(-1, x_BTD.shape[-1]),
                                  file["router_rows"])  # fmt: skip
    close(routing.logits_NE, file["logits"])
    check(file, "eval", routing)


def test_gate_context() -> None:
    """The context half of our router's matrix alone, with the mean for a summary."""
    file = load("uniperceiver_moe", "gate_context")
    x_BTD, wg = jnp.asarray(file["tokens"]), file["param/wg.weight"].T
    kernel = jnp.concatenate([jnp.zeros_like(wg), wg])
    select = softmax_then_top_k_renormalised
    make = lambda *_: kernel  # noqa: E731
    router = ExploringRouter(*kernel.shape, K, select=select, init=make, rngs=nnx.Rngs(0))
    level = ContextLevel(router, grouped.reference, lambda x, mask=None: mean_token(x))
    told = Context()
    routing = level.decide(x_BTD, told).routing
    close(told.summaries[""], file["router_rows"])
    for token in range(x_BTD.shape[1]):
        rows = slice(token, None, x_BTD.shape[1])
        own = jax.tree.map(lambda a, rows=rows: a[rows] if a.shape[0] > 1 else a, routing)
        close(own.logits_NE, file["logits"])
        check(file, "eval", own)


def stack_of(params: dict) -> MergedLinear:
    """The reference's E layers `<e>.weight` (out, in) and `<e>.bias`."""
    count = len(params) // 2
    kernel = np.stack([params[f"{e}.weight"].T for e in range(count)])
    maps = MergedLinear(*kernel.shape, init=lambda *_: kernel, rngs=nnx.Rngs(0))
    maps.bias.set_value(jnp.stack([params[f"{e}.bias"] for e in range(count)]))
    return maps


EXPERTS = "param/experts.deepspeed_experts."


def gate_of(file: dict, prefix: str, k: int = K, **options) -> RowLevel:
    own = {f"param/{name}": a for name, a in under(file, prefix).items()}
    return RowLevel(router_of(own, as_it_is, k, **options))


def rows_told(file: dict, kind: str, split: int, **more) -> Context:
    rows = jnp.asarray(file[f"cond_{kind}"])
    where = WHOLE if rows.shape[0] == 1 else Segments((split,), (0, 1))
    return Context(attributes_RA=rows, where=where, **more)


def test_taskmoe_top1() -> None:
    file = load("uniperceiver_moe", "taskmoe_top1")
    level = gate_of(file, "param/gate.", k=1, select=softmax_then_top_k)
    layer = level.layer(stack_of(under(file, EXPERTS)))
    x_BTD, split = jnp.asarray(file["x"]), int(file["data_cum_length"][1])
    for kind in ("unimodal", "multimodal"):
        decision = level.decide(x_BTD, rows_told(file, kind, split))
        np.testing.assert_array_equal(decision.routing.experts_NK[:, 0], file[f"idx_{kind}"])
        close(decision.routing.weights_NK[:, 0], file[f"gate_{kind}"])
        close(decision(layer, x_BTD), file[f"y_{kind}"])


def test_taskmoe_top2_merged() -> None:
    file = load("uniperceiver_moe", "taskmoe_top2_merged")
    level = gate_of(file, "param/gate.")
    layer = level.layer(stack_of(under(file, EXPERTS)))
    x_BTD, split = jnp.asarray(file["x"]), int(file["data_cum_length"][1])
    told = {kind: rows_told(file, kind, split) for kind in ("unimodal", "multimodal")}
    for kind, own in told.items():
        decision = level.decide(x_BTD, own)
        np.testing.assert_array_equal(decision.routing.experts_NK.T, file[f"idx_{kind}"])
        close(decision.routing.weights_NK.T, file[f"gates_{kind}"])
        close(decision(layer, x_BTD), file[f"y_{kind}"])
    decision = level.decide(x_BTD, told["multimodal"])
    weights, width = decision.weights_RE, file["y_q"].shape[-1]
    prompt = Segments((split + int(file["pe_length"]),), (0, 1))
    parts = {
        "y_q": (x_BTD, decision.where, slice(None, width)),
        "y_kv": (x_BTD, decision.where, slice(width, None)),
        "y_kv_with_prompt": (jnp.asarray(file["x_prompt"]), prompt, slice(width, None)),
        "y_caption_gen": (jnp.asarray(file["x_gen"]), Segments(rows=(1,)), ALL),
    }
    for name, (x, where, part) in parts.items():
        close(layer.experts(x, weights, where, part), file[name])


def test_taskmoe_top2_gradients() -> None:
    file = load("uniperceiver_moe", "taskmoe_top2_merged")
    level = gate_of(file, "param/gate.")
    layer = level.layer(stack_of(under(file, EXPERTS)))
    split = int(file["data_cum_length"][1])

    def loss(level: RowLevel, layer, x_BTD) -> jax.Array:
        y_BTO = level.decide(x_BTD, rows_told(file, "multimodal", split))(layer, x_BTD)
        return jnp.mean(jnp.square(y_BTO))

    value, grads = nnx.value_and_grad(loss, argnums=(0, 1, 2))(level, layer, jnp.asarray(file["x"]))
    close(value, file["loss_mean_sq_multimodal"])
    close(grads[2], file["grad_x"])
    router, maps = grads[0]["router"], grads[1]["experts"]
    wanted = under(file, "grad/")
    linear, norm = sorted({n.split(".")[2] for n in wanted if n.startswith("gate.tag_transform")})
    gate = f"gate.tag_transform.{linear}"
    close(router["embed"]["kernel"].get_value().T, wanted[f"{gate}.weight"])
    close(router["embed"]["bias"].get_value(), wanted[f"{gate}.bias"])
    close(router["norm"]["scale"].get_value(), wanted[f"gate.tag_transform.{norm}.weight"])
    close(router["norm"]["bias"].get_value(), wanted[f"gate.tag_transform.{norm}.bias"])
    close(router["kernel"].get_value().T, wanted["gate.wg.weight"])
    for e, (kernel_IO, bias_O) in enumerate(
        zip(maps["kernel"].get_value(), maps["bias"].get_value(), strict=True)
    ):
        close(kernel_IO.T, wanted[f"experts.deepspeed_experts.{e}.weight"])
        close(bias_O, wanted[f"experts.deepspeed_experts.{e}.bias"])


def block_of(file: dict, gates: tuple[str, ...]) -> ConditionalBlock:
    """The reference's layer in our block; `gates` are those of qkv, linear1 (and linear2)."""
    levels = [gate_of(file, f"param/{name}.gate.") for name in gates]
    count = levels[0].router.kernel.shape[1]
    makes = [ConditionalMake(lambda rngs, level=level: level, count) for level in levels]
    hidden, width = file["param/linear1.experts.deepspeed_experts.0.weight"].shape
    heads, sep = int(file["num_heads"]), makes[2] if len(makes) == 3 else None
    block = ConditionalBlock(width, heads, hidden, makes[0], make2=sep, epsilon=1e-5,
                             rngs=nnx.Rngs(0))  # fmt: skip
    block.mlp.level = levels[1]
    names = {"attn/qkv": "self_attn.qkv_proj", "attn/proj": "self_attn.dense"}
    names |= {"mlp/fc1": "linear1", "mlp/fc2": "linear2"}
    for path, name in names.items():
        stack = stack_of(under(file, f"param/{name}.experts.deepspeed_experts."))
        surgery.get(block, path).experts = stack
    for i in (1, 2):
        norm = surgery.get(block, f"norm{i}")
        norm.scale.set_value(jnp.asarray(file[f"param/norm{i}.weight"]))
        norm.bias.set_value(jnp.asarray(file[f"param/norm{i}.bias"]))
        surgery.get(block, f"scale{i}").scale.set_value(jnp.asarray(file[f"param/gamma_{i}"]))
    return block


LAYERS = {
    "encoder_layer_shared_ffn_gate": ("self_attn.qkv_proj", "linear1"),
    "encoder_layer_separate_ffn_gate": ("self_attn.qkv_proj", "linear1", "linear2"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_encoder_layer(name: str) -> None:
    file = load("uniperceiver_moe", name)
    block, x_BTD = block_of(file, LAYERS[name]), jnp.asarray(file["x"])
    split, tokens = int(file["data_cum_length"][1]), x_BTD.shape[1]
    everything = jnp.ones((x_BTD.shape[0], tokens, tokens), bool)
    for kind in ("unimodal", "multimodal"):
        y_BTD, _ = block(x_BTD, rows_told(file, kind, split), everything)
        close(y_BTD, file[f"y_{kind}"])
    told = rows_told(file, "multimodal", split)
    seen = everything & ~file["attn_mask"] & ~file["key_padding_mask"][:, None, :]
    close(block(x_BTD, told, seen)[0], file["y_masked"])
    levels = [block.attn.level, block.mlp.level, block.mlp.level2]
    for eps_RE, level in zip(file["noise_per_gate_call"], levels, strict=False):
        recorded = constant_noise(1.0)

        def noise(logits, eps, allowed, eps_RE=eps_RE, recorded=recorded) -> Noisy:
            return recorded(logits, jnp.asarray(eps_RE), allowed)

        level.router.explore = Explore(noise=noise)
    close(block(x_BTD, told, everything, jax.random.key(0))[0], file["y_train_noisy"])
