"""Selecting and replacing sub-modules by path."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moezoo.models.m3vit.model import M3ViTConfig
from moezoo.nn import module, surgery
from moezoo.nn.layers import MLP
from moezoo.nn.moe import MoE


@pytest.fixture(scope="module")
def parts():
    config = M3ViTConfig(
        width=8, depth=4, heads=2, patch=4, experts=2, top_k=1, head_channels=4, dispatch="blocks"
    )
    return module.create(lambda: config.build({"semseg": 3, "depth": 1}, (8, 8), nnx.Rngs(0)))


@pytest.fixture
def model(parts):
    return module.merge(*parts)


def records_of(model) -> set[str]:
    """Paths of the records of a pass, without running it."""
    return set(jax.eval_shape(lambda m, x: m(x), model, jnp.ones((1, 8, 8, 3))).records)


def test_paths_are_those_of_parameters(model):
    flat = module.flatten(module.split(model).params)
    assert "blocks/1/mlp/experts/fc1/kernel" in flat
    stack = surgery.get(model, "blocks/1/mlp/experts/fc1")
    assert stack.kernel.get_value() is flat["blocks/1/mlp/experts/fc1/kernel"]
    assert surgery.get(model, "") is model


def test_find_gives_paths_in_order(model):
    assert list(surgery.find(model, MoE)) == ["blocks/1/mlp", "blocks/3/mlp"]
    assert list(surgery.find(model, lambda m: isinstance(m, MLP))) == [
        "blocks/0/mlp",
        "blocks/2/mlp",
    ]


def test_replacing_changes_the_computation_and_the_parameters(model):
    assert records_of(model) == {"blocks/1/mlp", "blocks/3/mlp"}
    surgery.replace(model, "blocks/1/mlp", MLP(8, 16, rngs=nnx.Rngs(1)))
    assert records_of(model) == {"blocks/3/mlp"}
    flat = module.flatten(module.split(model).params)
    assert "blocks/1/mlp/fc1/kernel" in flat and "blocks/1/mlp/router/kernel" not in flat
    parts = module.split(model)
    assert records_of(module.merge(*parts)) == {"blocks/3/mlp"}


def test_entries_of_lists_and_dictionaries_are_replaced(model):
    surgery.replace(model, "blocks/0", model.blocks[2])
    assert model.blocks[0] is model.blocks[2]
    head = model.heads["depth"]
    surgery.replace(model, "heads/semseg", head)
    assert model.heads["semseg"] is head


def test_removing_a_head(model):
    surgery.remove(model, "heads/semseg")
    assert "heads/semseg/norm/scale" not in module.flatten(module.split(model).params)
    alone = jax.eval_shape(lambda m, x: m(x, tasks=("depth",)), model, jnp.ones((1, 8, 8, 3)))
    assert set(alone.predictions) == {"depth"}
    with pytest.raises(TypeError, match="blocks/0"):
        surgery.remove(model, "blocks/0")


@pytest.mark.parametrize("path", ["blocks/9/mlp", "blocks/x", "heads/normals", "nothing"])
def test_unknown_paths_name_the_part_that_is_missing(model, path):
    with pytest.raises(KeyError, match=path.split("/")[-1 if path == "nothing" else 1]):
        surgery.get(model, path)
    with pytest.raises(KeyError):
        surgery.replace(model, path, None)
