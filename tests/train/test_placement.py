"""The placement table on parameters, optimiser state and statistics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from moezoo.backbones.decoder import DecoderConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.train import placement
from moezoo.train.mesh import make_mesh
from moezoo.train.placement import PlacementRule
from moezoo.train.schema import MeshConfig

PARAMS = {
    "blocks": {
        "0": {
            "attn": {"qkv": {"kernel": jnp.zeros((6, 18)), "bias": jnp.zeros(18)}},
            "mlp": {
                "experts": {"up": {"kernel": jnp.zeros((4, 6, 8)), "bias": jnp.zeros((4, 8))}},
                "router": {"kernel": jnp.zeros((6, 5))},
            },
            "norm": {"scale": jnp.zeros(6)},
        }
    },
    "pos_embed": jnp.zeros((1, 9, 6)),
}


def specs(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {placement.path_name(path): leaf.spec for path, leaf in flat}


def test_default_table():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    found = specs(placement.shardings(mesh, PARAMS))
    block = "blocks/0/"
    assert found == {
        block + "attn/qkv/kernel": P(None, "fsdp"),
        block + "attn/qkv/bias": P(),
        block + "mlp/experts/up/kernel": P("expert", None, "fsdp"),
        block + "mlp/experts/up/bias": P("expert"),
        block + "mlp/router/kernel": P("fsdp"),
        block + "norm/scale": P(),
        "pos_embed": P(),
    }


def test_moments_are_shared_out_over_data():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, expert=2))
    state = {"params": PARAMS, "optimiser": jax.eval_shape(optax.adamw(1e-3).init, PARAMS)}
    plain, split = (specs(placement.shardings(mesh, state, t)) for t in placement.TABLES.values())
    block = "optimiser/0/mu/blocks/0/"
    assert {path: s for path, s in split.items() if path.startswith("optimiser/0/mu/")} == {
        block + "attn/qkv/kernel": P("data", "fsdp"),
        block + "attn/qkv/bias": P("data"),
        block + "mlp/experts/up/kernel": P("expert", "data", "fsdp"),
        block + "mlp/experts/up/bias": P("expert", "data"),
        block + "mlp/router/kernel": P("fsdp"),  # 5 columns
        block + "norm/scale": P("data"),
        "optimiser/0/mu/pos_embed": P(None, None, "data"),
    }
    assert split["optimiser/0/count"] == P()
    for path, spec in plain.items():
        assert path.startswith("optimiser") or split[path] == spec


def decoder_specs(mesh) -> dict:
    sizes = {"vocabulary": 16, "width": 8, "depth": 1, "heads": 4, "groups": 2, "hidden": 12}
    config = DecoderConfig(**sizes, head_width=6, qkv_bias=True, qk_norm=True)
    shapes = module.abstract(lambda: config.build(nnx.Rngs(0))).params
    adapted = {"layers": {"1": {"attn": {"v": {"base": {"kernel": jnp.zeros((8, 12))}}}}}}
    layers = shapes["layers"] | adapted["layers"]
    return specs(placement.shardings(mesh, shapes | {"layers": layers}))


def test_decoders_are_split_by_columns_then_rows():
    found = decoder_specs(make_mesh(MeshConfig(fsdp=2, tensor=4)))
    columns, rows = P("fsdp", "tensor"), P("tensor", "fsdp")
    for name in ("attn/q", "attn/k", "attn/v", "mlp/gate", "mlp/up"):
        assert found[f"layers/0/{name}/kernel"] == columns
    assert found["layers/1/attn/v/base/kernel"] == found["lm_head/kernel"] == columns
    for name in ("layers/0/attn/o/kernel", "layers/0/mlp/down/kernel", "embed/table"):
        assert found[name] == rows
    assert found["layers/0/attn/q/bias"] == P("tensor")
    assert found["layers/0/attn/q_norm/scale"] == found["layers/0/norm1/scale"] == P()


def test_decoders_without_a_tensor_axis_are_split_where_they_are_largest():
    found = decoder_specs(make_mesh(MeshConfig(fsdp=4, data=2)))
    assert found["layers/0/attn/q/kernel"] == found["lm_head/kernel"] == P(None, "fsdp")
    assert found["layers/0/mlp/down/kernel"] == found["embed/table"] == P("fsdp")


def test_moments_lie_where_their_parameters_lie():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2))
    state = {
        "params": PARAMS,
        "optimiser": jax.eval_shape(optax.adamw(1e-3).init, PARAMS),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    found = specs(placement.shardings(mesh, state))
    params = {path[7:]: spec for path, spec in found.items() if path.startswith("params/")}
    for moment in ("mu", "nu"):
        prefix = f"optimiser/0/{moment}/"
        moments = {p.removeprefix(prefix): s for p, s in found.items() if p.startswith(prefix)}
        assert moments == params
    assert found["step"] == found["optimiser/0/count"] == P()


def test_state_is_created_on_its_shards():
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))
    shardings = placement.shardings(mesh, jax.eval_shape(lambda: PARAMS))
    created = jax.jit(lambda: PARAMS, out_shardings=shardings)()
    experts = created["blocks"]["0"]["mlp"]["experts"]["up"]["kernel"]
    assert experts.addressable_shards[0].data.shape == (1, 6, 4)


def test_dimensions_that_no_axis_divides_stay_whole_and_are_reported():
    mesh = make_mesh(MeshConfig(fsdp=4))
    tree = {"a": {"kernel": jnp.zeros((3, 7))}, "b": {"kernel": jnp.zeros((4, 7))}}
    placed = placement.place(mesh, tree)
    assert specs(placed.shardings) == {"a/kernel": P(), "b/kernel": P("fsdp")}
    assert placed.kept_whole == {"a/kernel": "7 is not a multiple of fsdp=4"}


def test_experts_that_do_not_split_are_a_user_error():
    mesh = make_mesh(MeshConfig(expert=8))
    with pytest.raises(UserError, match="blocks/0/mlp/experts/up/.* has 4 experts.*mesh.expert=8"):
        placement.shardings(mesh, PARAMS)


def test_rules_apply_in_order_and_must_cover():
    mesh = make_mesh(MeshConfig(fsdp=8))
    rules = (
        PlacementRule("qkv/kernel$", placement.whole),
        PlacementRule("kernel$", placement.largest),
    )
    tree = {"qkv": {"kernel": jnp.zeros((8, 8))}, "up": {"kernel": jnp.zeros((8, 8))}}
    assert specs(placement.shardings(mesh, tree, rules)) == {
        "qkv/kernel": P(),
        "up/kernel": P("fsdp"),
    }
    with pytest.raises(UserError, match="No placement rule matches bias"):
        placement.shardings(mesh, {"bias": np.zeros(2)}, rules)
