"""M3ViT's modules against the published code: layer, block, encoder, head, step."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moezoo.backbones.vit import Block
from moezoo.domains.images.tasks import depth
from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.models.shared.multitask import TAM
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.experts import MLPExperts
from moezoo.nn.heads import UpConvHead
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter, MultiGateRouter, Router, TaskEmbeddingRouter
from moezoo.ops import balance, grouped
from moezoo.ops.interpolate import resize_position_embedding
from moezoo.ops.routing import Routing, drop_small_weights, only
from moezoo.tasks import losses
from moezoo.weights import m3vit_names as names
from moezoo.weights.names import NameTable
from tests.fixtures import cases, from_manifest, hash_uniform, load, text, under

LAYER = {"rtol": 1e-5, "atol": 1e-5}
NETWORK = {"rtol": 1e-4, "atol": 1e-4}


def filled(
    build: Callable[[], nnx.Module], state: dict[str, np.ndarray], table: NameTable, **known
) -> module.ModuleParts:
    """The parts of `build()` with exactly these weights; every one of them must find its place."""
    shapes = module.abstract(build)
    flat, unknown = names.from_m3vit(state, table)
    assert not unknown
    flat |= known
    wanted = module.flatten(shapes.params) | module.flatten(shapes.stats)
    assert {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in flat.items()}
    pick = {k: jnp.asarray(flat[k]) for k in wanted}
    params = {k: pick[k] for k in module.flatten(shapes.params)}
    stats = {k: pick[k] for k in module.flatten(shapes.stats)}
    return module.ModuleParts(shapes.definition, module.unflatten(params), module.unflatten(stats))


def nchw(a: np.ndarray) -> np.ndarray:
    return np.asarray(a).transpose(0, 3, 1, 2)


def nhwc(a: np.ndarray) -> jax.Array:
    return jnp.asarray(a.transpose(0, 2, 3, 1))


def assert_routing(routing: Routing, experts: np.ndarray, weights: np.ndarray) -> None:
    np.testing.assert_array_equal(routing.experts_NK, experts)
    np.testing.assert_allclose(routing.weights_NK, weights, **LAYER)


# --- MoE layer -------------------------------------------------------------------------------

LAYER_TABLE: NameTable = [
    line._replace(
        ours=line.ours[len("blocks/{0}/mlp/") :], theirs=line.theirs[len("blocks.{0}.mlp.") :]
    )
    for line in names.ENCODER
    if line.ours.startswith(("blocks/{0}/mlp/router", "blocks/{0}/mlp/experts"))
]


@pytest.fixture(scope="module")
def layer() -> dict[str, np.ndarray]:
    return load("m3vit", "moe_layer")


def tasks_of(arrays: dict[str, np.ndarray], stem: str) -> list[int]:
    return sorted(int(name.removeprefix(stem)) for name in arrays if name.startswith(stem))


def moe_parts(
    arrays: dict[str, np.ndarray], make_router: Callable[[], Router]
) -> module.ModuleParts:
    state = under(arrays, "w/")
    e, hidden, width = state["experts.htoh4.weight"].shape

    def build() -> MoE:
        experts = MLPExperts(e, width, hidden, rngs=nnx.Rngs(0))
        return MoE(make_router(), experts, grouped.auto)

    return filled(build, state, LAYER_TABLE)


def single(arrays: dict[str, np.ndarray]) -> module.ModuleParts:
    width, experts = arrays["single/w/gate.w_gate"].shape
    k = int(arrays["top_k"])
    return moe_parts(
        under(arrays, "single/"), lambda: LinearRouter(width, experts, k, rngs=nnx.Rngs(0))
    )


def rows(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.reshape(-1, x.shape[-1]))


def test_moe_layer_with_one_router(layer):
    moe = module.merge(*single(layer))
    y, record = moe(rows(layer["x"]))
    assert_routing(record.routing, layer["single/idx"], layer["single/gate"])
    np.testing.assert_allclose(y, rows(layer["single/y"]), **LAYER)
    counts = np.bincount(np.ravel(record.routing.experts_NK), minlength=moe.experts.count)
    np.testing.assert_array_equal(counts, layer["single/expert_counts"])


def test_moe_layer_with_small_weights_dropped(layer):
    moe, x = module.merge(*single(layer)), rows(layer["x"])
    routing = moe.router(x, Context(0))
    cases = [name for name in layer if name.startswith("prune/y_thr")]
    assert cases
    for name in cases:
        dropped = drop_small_weights(routing, float(name.removeprefix("prune/y_thr")))
        y = moe.apply(moe.experts.fn, moe.experts.stacked(), x, dropped).y_ND
        np.testing.assert_allclose(y, rows(layer[name]), **LAYER)


def test_moe_layer_whose_router_sees_something_else(layer):
    moe = module.merge(*single(layer))
    y = moe(rows(layer["x"]), router_input_ND=rows(layer["gateinp/gate_inp"])).y_ND
    np.testing.assert_allclose(y, rows(layer["gateinp/y"]), **LAYER)


@pytest.mark.parametrize("kind", ["multi", "taskcond"])
def test_moe_layer_with_tasks_one_by_one_and_all_in_one_batch(layer, kind):
    arrays, k = under(layer, f"{kind}/"), int(layer["top_k"])
    tasks, batch = tasks_of(arrays, "y_task"), layer["x"].shape[0]
    width, features_JF = layer["x"].shape[-1], None
    if kind == "multi":
        experts = arrays["w/gate.0.w_gate"].shape[1]
        parts = moe_parts(
            arrays, lambda: MultiGateRouter(len(tasks), width, experts, k, rngs=nnx.Rngs(0))
        )
    else:
        features_JF = jnp.stack([arrays[f"task_feature{t}"] for t in tasks])
        inputs, experts = arrays["w/gate.w_gate"].shape
        parts = moe_parts(
            arrays,
            lambda: TaskEmbeddingRouter(width, inputs - width, experts, k, rngs=nnx.Rngs(0)),
        )
    moe, x = module.merge(*parts), layer["x"]
    for task in tasks:
        y, record = moe(rows(x), Context(task, features_JF))
        assert_routing(record.routing, arrays[f"idx_task{task}"], arrays[f"gate_task{task}"])
        np.testing.assert_allclose(y, rows(arrays[f"y_task{task}"]), **LAYER)
    rows_of_tasks = jnp.repeat(jnp.asarray(tasks, jnp.int32), batch)
    y, record = moe(rows(np.concatenate([x] * len(tasks))), Context(rows_of_tasks, features_JF))
    together = [np.concatenate([arrays[f"{n}_task{t}"] for t in tasks]) for n in ("idx", "gate")]
    assert_routing(record.routing, *together)
    wanted = np.concatenate([rows(arrays[f"y_task{t}"]) for t in tasks])
    np.testing.assert_allclose(y, wanted, **LAYER)


def test_moe_layer_gradients_with_the_balance_loss(layer):
    parts, arrays = single(layer), under(layer, "train0/")

    @jax.jit
    def loss(params, x):
        y, record = module.merge(parts.definition, params, parts.stats)(x)
        balanced = 0.01 * reference_balance(record.routing)
        return jnp.sum(y * rows(arrays["R"])) + balanced, (y, balanced)

    (total, (y, balanced)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        parts.params, rows(layer["x"])
    )
    np.testing.assert_allclose(y, rows(arrays["y"]), **LAYER)
    np.testing.assert_allclose(balanced, arrays["balance_x0p01"], **LAYER)
    np.testing.assert_allclose(total, arrays["L"], **LAYER)
    np.testing.assert_allclose(grads[1], rows(arrays["grad_x"]), **LAYER)
    wanted, unknown = names.from_m3vit(under(arrays, "grad/"), LAYER_TABLE)
    assert not unknown and set(wanted) == set(module.flatten(parts.params))
    for path, gradient in module.flatten(grads[0]).items():
        np.testing.assert_allclose(gradient, wanted[path], **LAYER)


def reference_balance(routing: Routing) -> jax.Array:
    """Both terms of the published code; without noise its load is a count, free of gradients."""
    return balance.importance_loss(routing) + balance.load_loss(routing)


# --- Block and encoder -----------------------------------------------------------------------

BLOCK_TABLE: NameTable = [
    line._replace(ours=line.ours[len("blocks/{0}/") :], theirs=line.theirs[len("blocks.{0}.") :])
    for line in names.ENCODER
    if line.ours.startswith("blocks/{0}/")
]


def block_parts(arrays: dict[str, np.ndarray], kind: str, **options) -> module.ModuleParts:
    state = under(arrays, f"{kind}/w/")
    width, heads, k = arrays["x"].shape[-1], int(arrays["num_heads"]), int(arrays["top_k"])

    def build() -> Block:
        rngs = nnx.Rngs(0)
        if kind == "dense":
            mlp: nnx.Module = MLP(width, state["mlp.fc1.weight"].shape[0], rngs=rngs)
        else:
            e, hidden, _ = state["mlp.experts.htoh4.weight"].shape
            tasks = sum(".w_gate" in name for name in state)
            router = MultiGateRouter(tasks, width, e, k, rngs=rngs)
            mlp = MoE(router, MLPExperts(e, width, hidden, rngs=rngs), grouped.auto)
        return Block(width, heads, mlp, rngs=rngs, **options)

    return filled(build, state, BLOCK_TABLE)


def test_dense_block():
    arrays = load("m3vit", "block")
    y = module.merge(*block_parts(arrays, "dense"))(jnp.asarray(arrays["x"])).x_BTD
    np.testing.assert_allclose(y, arrays["dense/y"], **LAYER)


def test_moe_block():
    arrays = load("m3vit", "block")
    block, x = module.merge(*block_parts(arrays, "moe")), jnp.asarray(arrays["x"])
    attended = block.attend(x).x_BTD
    np.testing.assert_allclose(attended, arrays["moe/after_attention_residual"], **LAYER)
    tasks = tasks_of(arrays, "moe/idx_task")
    assert tasks
    for task in tasks:
        y, record = block(x, Context(task))
        assert record is not None
        given = arrays[f"moe/idx_task{task}"], arrays[f"moe/gate_task{task}"]
        assert_routing(record.routing, *given)
        np.testing.assert_allclose(y, arrays[f"moe/y_task{task}"], **LAYER)


def test_moe_block_whose_router_sees_the_block_input():
    arrays = load("m3vit", "block")
    block = module.merge(*block_parts(arrays, "moe", router_sees="block_input"))
    y = block(jnp.asarray(arrays["x"]), Context(0)).x_BTD
    np.testing.assert_allclose(y, arrays["moe/y_task0_gate_input_ahead"], **LAYER)


def encoder(cfg: dict, state: dict[str, np.ndarray], **options) -> module.ModuleParts:
    """An M3ViT with these encoder weights, and heads that nobody looks at."""
    config = M3ViTConfig(
        width=cfg["embed"],
        depth=cfg["depth"],
        heads=cfg["heads"],
        patch=cfg["patch"],
        mlp_ratio=cfg["mlp_ratio"],
        experts=cfg["experts"],
        top_k=cfg["top_k"],
        expert_ratio=cfg["moe_mlp_ratio"],
        head_channels=1,
        **options,
    )
    height, width = cfg["img_size"]

    def build() -> nnx.Module:
        tasks = {f"t{j}": 1 for j in range(cfg["tasks"])}
        return config.build(tasks, (height, width), nnx.Rngs(0))

    shapes = module.abstract(build)
    leaves = module.flatten(shapes.params) | module.flatten(shapes.stats)
    heads = {k: np.zeros(v.shape) for k, v in leaves.items() if k.startswith("heads/")}
    return filled(build, state, names.ENCODER, **heads)


def encoded(parts: module.ModuleParts, image: jax.Array, tasks: list[int]):
    """Last tokens [B, J, T, D] and the records of one pass for these tasks."""

    @jax.jit
    def run(params, stats):
        records: dict = {}
        model = module.merge(parts.definition, params, stats)
        tokens = model.encode(image, tasks, None, records)
        return tokens.reshape(image.shape[0], len(tasks), *tokens.shape[1:]), records

    return run(parts.params, parts.stats)


def assert_layer_routing(record, task: int, experts: np.ndarray, weights: np.ndarray) -> None:
    mine = np.asarray(record.task_N) == task
    np.testing.assert_array_equal(np.asarray(record.routing.experts_NK)[mine], experts)
    np.testing.assert_allclose(np.asarray(record.routing.weights_NK)[mine], weights, **NETWORK)


@pytest.mark.parametrize("together", [False, True])
def test_encoder_with_one_router_per_task(together):
    arrays = load("m3vit", "backbone")
    cfg = text(arrays["cfg_json"])
    parts = encoder(cfg, under(arrays, "w/"))
    tasks = list(range(cfg["tasks"]))
    for chosen in [tasks] if together else [[t] for t in tasks]:
        final, records = encoded(parts, nhwc(arrays["image"]), chosen)
        assert records
        for j, task in enumerate(chosen):
            wanted = arrays[f"task{task}/out{cfg['depth'] - 1}"]
            np.testing.assert_allclose(final[:, j], wanted, **NETWORK)
            for path, record in records.items():
                stem = f"task{task}/b{path.split('/')[1]}_gate{task}"
                given = arrays[f"{stem}_idx"], arrays[f"{stem}_gate"]
                assert_layer_routing(record, task, *given)


def test_encoder_block_by_block():
    arrays = load("m3vit", "backbone")
    cfg = text(arrays["cfg_json"])
    parts = encoder(cfg, under(arrays, "w/"))

    @jax.jit
    def outputs(params, stats, task):
        model = module.merge(parts.definition, params, stats)
        outs = [model.embed(nhwc(arrays["image"]))]
        for block in model.blocks:
            outs.append(block(outs[-1], Context(task)).x_BTD)
        return outs[1:]

    for task in range(cfg["tasks"]):
        outs = outputs(parts.params, parts.stats, task)
        given = {i: arrays[f"task{task}/out{i}"] for i in range(cfg["depth"])
                 if f"task{task}/out{i}" in arrays}  # fmt: skip
        assert len(given) >= 2
        for i, wanted in given.items():
            np.testing.assert_allclose(outs[i], wanted, **NETWORK)


@pytest.mark.parametrize("together", [False, True])
def test_encoder_with_a_task_embedding(together):
    arrays = load("m3vit", "backbone_taskcond")
    cfg = text(arrays["cfg_json"])
    options = {"routing": "task_conditioned", "task_embedding": cfg["gate_task_specific_dim"]}
    parts = encoder(cfg, from_manifest(arrays["manifest_json"]), **options)
    tasks = list(range(cfg["tasks"]))
    for task, features_F in enumerate(module.merge(*parts).task_embedding()):
        np.testing.assert_allclose(features_F, arrays[f"task{task}/task_feature"], **LAYER)
    for chosen in [tasks] if together else [[t] for t in tasks]:
        final, records = encoded(parts, nhwc(arrays["image"]), chosen)
        assert records
        for j, task in enumerate(chosen):
            np.testing.assert_allclose(final[:, j], arrays[f"task{task}/final"], **NETWORK)
            for path, record in records.items():
                stem = f"task{task}/{path.replace('/', '_')}_gate"
                given = arrays[f"{stem}_idx"], arrays[f"{stem}_gate"]
                assert_layer_routing(record, task, *given)


@pytest.mark.parametrize("case", cases("m3vit", "posembed", "src", ["up", "down"]))
def test_resized_position_embedding(case):
    arrays = under(load("m3vit", "posembed"), f"{case}/")
    height, width = (int(side) for side in arrays["hw"])
    resized = resize_position_embedding(jnp.asarray(arrays["src"]), (height, width))
    np.testing.assert_allclose(resized, arrays["dst"], **LAYER)


# --- Head and TAM ----------------------------------------------------------------------------


def test_head():
    arrays = load("m3vit", "head")
    state = from_manifest(arrays["manifest_json"])
    steps = sum(name.startswith("syncbn_fc_") and name.endswith(".weight") for name in state)
    outputs, channels = state[f"conv_{steps}.weight"].shape[:2]
    tokens = jnp.asarray(arrays["tokens"])
    parts = filled(
        lambda: UpConvHead(tokens.shape[-1], outputs, steps, channels=channels, rngs=nnx.Rngs(0)),
        state,
        names.HEAD,
    )
    height, width = (int(side) for side in arrays["grid"])
    run = jax.jit(lambda p, s, train: module.merge(parts.definition, p, s)(
        tokens, (height, width), train).logits_BHWC, static_argnums=2)  # fmt: skip
    for name, train in (("y_eval", False), ("y_train_batchstats", True)):
        logits = run(parts.params, parts.stats, train)
        np.testing.assert_allclose(nchw(logits), arrays[name], **NETWORK)


def test_tam():
    arrays = load("m3vit", "tam")
    state = from_manifest(arrays["manifest_json"])
    tasks = text(arrays["tasks_json"])
    ours = {task: names.TASKS.get(task, task) for task in tasks}
    channels = arrays[f"in/{tasks[0]}"].shape[1]
    outputs = {ours[t]: state[f"layers4.{t}.0.weight"].shape[0] for t in tasks}
    refined = state[f"layers4.{tasks[0]}.0.weight"].shape[1]
    parts = filled(lambda: TAM(outputs, channels, refined, rngs=nnx.Rngs(0)), state, names.TAM)
    features = {ours[t]: nhwc(arrays[f"in/{t}"]) for t in tasks}
    run = jax.jit(lambda p, s: module.merge(parts.definition, p, s)(features))
    again = run(parts.params, parts.stats)
    for task in tasks:
        np.testing.assert_allclose(nchw(again[ours[task]]), arrays[f"out/{task}"], **NETWORK)


# --- Two training steps ----------------------------------------------------------------------


def training_model(cfg: dict, state: dict[str, np.ndarray]) -> module.ModuleParts:
    channels = state[f"decoders.{cfg['tasks'][0]}.conv_0.weight"].shape[0]
    width = state["backbone.blocks.1.mlp.experts.htoh4.weight"].shape[1]
    hidden = state["backbone.blocks.0.mlp.fc1.weight"].shape[0]
    config = M3ViTConfig(
        width=cfg["embed"], depth=cfg["depth"], heads=cfg["heads"], patch=cfg["patch"],
        mlp_ratio=hidden / cfg["embed"], experts=cfg["experts"], top_k=cfg["top_k"],
        expert_ratio=width / cfg["embed"], head_channels=channels,
    )  # fmt: skip
    outputs = {task: cfg["classes"][task] for task in cfg["tasks"]}
    height, width = cfg["img_size"]
    return filled(lambda: config.build(outputs, (height, width), nnx.Rngs(0)), state, names.MODEL)


def total_loss(parts: module.ModuleParts, image, label_semseg, label_depth):
    """(total, (named losses, predictions, new statistics)) of parameters and statistics."""

    def loss(params, stats):
        model = module.merge(parts.definition, params, stats)
        output = model(image, train=True)
        named = {
            "loss_semseg": losses.cross_entropy(output.predictions["semseg"], label_semseg),
            "loss_depth": depth.l1(
                output.predictions["depth"], label_depth, validity=depth.not_marked(255)
            ),
            "gating_x0p01": 0.01 * balance_of_tasks(output.records, len(model.tasks)),
        }
        named["total"] = sum(named.values())
        return named["total"], (named, output.predictions, module.updated_stats(model))

    return loss


def balance_of_tasks(records, tasks: int) -> jax.Array:
    """The published sum over layers and routers."""
    total = jnp.zeros(())
    for record in records.values():
        for task in range(tasks):
            total += reference_balance(only(record.routing, record.task_N == task))
    return total


@pytest.mark.slow
def test_two_training_steps():
    arrays = load("m3vit", "train_step")
    cfg = text(arrays["cfg_json"])
    assert sorted(cfg["tasks"]) == ["depth", "semseg"]
    parts = training_model(cfg, from_manifest(arrays["manifest_json"]))
    batch = arrays["label_semseg"].shape[0]
    image = nhwc(2 * hash_uniform((batch, 3, *cfg["img_size"]), cfg["image_seed"]))
    labels = arrays["label_semseg"][:, 0], arrays["label_depth"][:, 0]
    loss = total_loss(parts, image.astype(jnp.float32), *map(jnp.asarray, labels))
    optimiser = optax.chain(
        optax.add_decayed_weights(cfg["weight_decay"]), optax.sgd(cfg["lr"], cfg["momentum"])
    )

    @jax.jit
    def step(params, stats, moments):
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, stats)
        updates, moments = optimiser.update(grads, moments, params)
        return optax.apply_updates(params, updates), aux, grads, moments

    params, stats, moments = parts.params, parts.stats, optimiser.init(parts.params)
    for i in range(2):
        params, (named, predictions, stats), grads, moments = step(params, stats, moments)
        for name, value in named.items():
            np.testing.assert_allclose(value, arrays[f"iter{i}/{name}"], **NETWORK)
        if i == 0:
            assert_first_outputs(arrays, predictions)
            assert_first_gradients(arrays, grads)
        if i == 1 or not recorded_by_reference(arrays):
            assert_parameters(under(arrays, f"iter{i}/param_after/"), params)


def recorded_by_reference(arrays) -> bool:
    """Whether the file's parameters "after step 0" are those after step 1, bit for bit.

    They are where the recording kept views of tensors that the second step then changed.
    """
    first, second = (under(arrays, f"iter{i}/param_after/") for i in (0, 1))
    return all(np.array_equal(first[name], second[name]) for name in first)


def assert_parameters(wanted, params) -> None:
    after = names.to_reference(module.flatten(jax.device_get(params))).arrays
    assert wanted and set(wanted) <= set(after)
    for name, value in wanted.items():
        np.testing.assert_allclose(after[name], value, **NETWORK)


def assert_first_outputs(arrays, predictions) -> None:
    for task, stride in (("semseg", 4), ("depth", 2)):
        mine = nchw(predictions[task])[:1, :, ::stride, ::stride]
        np.testing.assert_allclose(mine, arrays[f"iter0/out_{task}"], **NETWORK)


def assert_first_gradients(arrays, grads) -> None:
    """1e-3 of each array's largest entry, as the fixtures' description says."""
    mine = names.to_reference(module.flatten(jax.device_get(grads))).arrays
    wanted = under(arrays, "iter0/grad/")
    assert wanted and set(wanted) <= set(mine)
    for name, value in wanted.items():
        np.testing.assert_allclose(mine[name], value, rtol=0, atol=1e-3 * np.abs(value).max())
