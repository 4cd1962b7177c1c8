"""The whole V-MoE, sparse upcycling and the resizing of positions, number by number."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.models.vmoe.model import VMoEConfig
from moezoo.nn import module, upcycle
from moezoo.ops import balance
from moezoo.ops.groups import into_groups
from moezoo.ops.interpolate import zoom_position_embedding
from moezoo.weights.vmoe_names import from_reference, to_reference
from tests.fixtures import load, text, under
from tests.parity.vmoe import close, vmoe_losses

TASK = "scene"
POOLS = {"token": "token", "gap": "mean"}


def config_of(described: dict[str, Any], images: int) -> VMoEConfig:
    """Our configuration for constructor arguments of the reference."""
    encoder, moe = described["encoder"], described["encoder"]["moe"]
    router, pool = moe["router"], POOLS[described["classifier"]]
    dispatch = router["dispatcher"]
    return VMoEConfig(
        width=described["hidden_size"],
        depth=encoder["num_layers"],
        heads=encoder["num_heads"],
        patch=described["patch_size"][0],
        mlp_ratio=encoder["mlp_dim"] / described["hidden_size"],
        experts=moe["num_experts"],
        top_k=router["num_selected_experts"],
        moe_blocks=tuple(moe["layers"]),
        noise_std=router["noise_std"],
        capacity_factor=dispatch["capacity_factor"],
        capacity_rounding=dispatch.get("capacity_ceil_or_round", "ceil"),
        capacity_multiple_of=dispatch.get("capacity_multiple_of", 4) or 1,
        priority="probability" if dispatch.get("batch_priority") else "position",
        group_images=images,
        pool=pool,
        positions=encoder.get("position_emb", {}).get("name", "learned"),
        qk_norm="layer" if encoder.get("attention_qk_norm") else "none",
        representation=described.get("representation_size"),
    )


def tree_of(arrays: dict[str, np.ndarray]) -> module.Tree:
    flat, unknown = from_reference(arrays, TASK)
    assert not unknown
    return module.unflatten({path: jnp.asarray(a) for path, a in flat.items()})


def parts_of(config: VMoEConfig, z: dict[str, np.ndarray], classes: int) -> module.ModuleParts:
    size = z["images"].shape[1:3]
    return module.abstract(lambda: config.build({TASK: classes}, size, nnx.Rngs(0)))


def test_whole_model() -> None:
    z = load("vmoe", "vit_moe_tiny")
    described: dict[str, Any] = text(z["config_json"])  # type: ignore[assignment]
    size, rows = described["encoder"]["moe"]["group_size"], len(z["images"])
    sides = [n // p for n, p in zip(z["images"].shape[1:3], described["patch_size"], strict=True)]
    tokens = math.prod(sides) + (described["classifier"] == "token")
    config = config_of(described, size // tokens)
    parts = parts_of(config, z, described["num_classes"])
    params = tree_of(under(z, "param/"))
    flat, shapes = module.flatten(params), module.flatten(parts.params)
    assert {k: a.shape for k, a in flat.items()} == {k: a.shape for k, a in shapes.items()}
    back, unknown = to_reference(flat, TASK, config.heads)
    assert not unknown and back.keys() == under(z, "param/").keys()
    for name, array in back.items():
        np.testing.assert_array_equal(array, z[f"param/{name}"], err_msg=name)

    def run(params: Any, image: Any) -> Any:
        model = module.merge(parts.definition, params, parts.stats)
        output = model(image)
        mean = {
            path: {name: loss(r.routing) for name, loss in model.balance_losses.items()}
            for path, r in output.records.items()
        }
        grouped = {path: into_groups(r.routing, size) for path, r in output.records.items()}
        by_group = {path: jax.vmap(vmoe_losses)(g) for path, g in grouped.items()}
        return output.predictions[TASK], mean, by_group

    logits, mean, by_group = jax.jit(run)(params, jnp.asarray(z["images"]))
    close(logits, z["logits"])
    layers = described["encoder"]["moe"]["layers"]
    assert set(by_group) == {f"blocks/{i}/mlp" for i in layers}
    assert rows * tokens % size == 0
    router = described["encoder"]["moe"]["router"]
    weight = {name: router.get(f"{name}_loss_weight", 0.0) for name in ("importance", "gshard")}
    total = 0.0
    for i in layers:
        metric, found = under(z, f"metric/encoderblock_{i}/"), by_group[f"blocks/{i}/mlp"]
        close(found["importance"], metric["importance_loss"])
        close(found["gshard"], metric["gshard_loss"])
        auxiliary = sum(weight[name] * np.asarray(found[name]) for name in weight)
        close(auxiliary, metric["auxiliary_loss"])
        ours = mean[f"blocks/{i}/mlp"]
        close(ours["importance"], metric["importance_loss"].mean())
        close(ours["switch"], metric["gshard_loss"].mean())
        total += auxiliary
    close(total, z["metric/auxiliary_loss"])


def sparse_config(z: dict[str, np.ndarray], **changes: Any) -> VMoEConfig:
    """The configuration of `sparse_upcycling`, whose sizes follow from its arrays."""
    dense = under(z, "dense/")
    patch, _, _, width = dense["embedding/kernel"].shape
    blocks = {name.split("/")[1] for name in dense if "encoderblock_" in name}
    sizes: dict[str, Any] = {
        "width": width,
        "depth": len(blocks),
        "heads": dense["Encoder/encoderblock_0/SelfAttention/query/kernel"].shape[1],
        "patch": patch,
        "mlp_ratio": dense["Encoder/encoderblock_0/Mlp/Dense_0/kernel"].shape[1] / width,
        "experts": int(z["num_experts"]),
        "top_k": int(z["num_selected_experts"]),
        "moe_blocks": tuple(int(i) for i in z["moe_layers"]),
        "capacity_factor": float(z["num_experts"]),
        "pool": "token" if "cls" in dense else "mean",
    }
    return VMoEConfig(**(sizes | changes))


def test_sparse_upcycling() -> None:
    z = load("vmoe", "sparse_upcycling")
    dense, classes = tree_of(under(z, "dense/")), z["dense_logits"].shape[1]
    image = jnp.asarray(z["images"])

    def logits(config: VMoEConfig, params: module.Tree) -> Any:
        parts = parts_of(config, z, classes)
        run = jax.jit(lambda p: module.merge(parts.definition, p, parts.stats)(image))
        return run(params).predictions[TASK]

    without = sparse_config(z, moe_blocks=(), moe_last=0)
    close(logits(without, dense), z["dense_logits"])
    config = sparse_config(z)
    fresh = module.flatten(parts_of(config, z, classes).params)
    routers, unknown = from_reference(under(z, "router/"), TASK)
    assert not unknown and routers
    params = upcycle.upcycle(dense, module.unflatten(fresh | routers))
    names, _ = to_reference(module.flatten(params), TASK, config.heads)
    ranks = {name: int(shape.shape[0]) for name, shape in under(z, "upcycled_shape/").items()}
    assert {name: np.ndim(a) for name, a in names.items()} == ranks
    close(logits(config, params), z["upcycled_logits"])
    # Of one expert alone these weights would always be 1, and are refused; two give as much.
    renormalised = sparse_config(z, selection="softmax_then_top_k_renormalised", top_k=2)
    close(logits(renormalised, params), z["dense_logits"])


def test_positions_of_another_grid() -> None:
    z = load("vmoe", "vit_zoom_pos_embedding")
    cases = sorted(name.removesuffix("_source") for name in z if name.endswith("_source"))
    assert cases
    for case in cases:
        target = jnp.full(tuple(z[f"{case}_target_shape"]), 7.0)
        close(
            zoom_position_embedding(jnp.asarray(z[f"{case}_source"]), target), z[f"{case}_result"]
        )


@pytest.mark.parametrize("images", [1, 3])
def test_losses_are_means_over_groups(images: int) -> None:
    """Three images in groups of one, and of all three."""
    config = VMoEConfig(width=8, depth=2, heads=2, patch=4, experts=3, group_images=images)
    parts = module.create(lambda: config.build({TASK: 2}, (8, 8), nnx.Rngs(0)))
    model = module.merge(*parts)
    image = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    (record,) = jax.jit(lambda: model(image))().records.values()
    found = model.balance_losses["importance"](record.routing)
    spread = balance.cv_squared_population
    probs_NE = np.asarray(record.routing.probs_NE).reshape(-1, 5 * images, 3)
    close(found, np.mean([spread(p.sum(0)) for p in probs_NE]))
