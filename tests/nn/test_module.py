"""Splitting a module into plain dictionaries and back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn import module


class Leaf(nnx.Module):
    def __init__(self, size: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (size, size)))
        self.mean = nnx.BatchStat(jnp.zeros(size))

    def __call__(self, x):
        self.mean.set_value(self.mean.get_value() + 1)
        return x @ self.kernel.get_value()


class Tower(nnx.Module):
    def __init__(self, depth: int, size: int, rngs: nnx.Rngs):
        self.blocks = nnx.List([Leaf(size, rngs) for _ in range(depth)])
        self.heads = nnx.Dict({"depth": Leaf(size, rngs)})

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads["depth"](x)


def test_split_gives_plain_string_keyed_dictionaries_and_merge_restores():
    tower = Tower(11, 3, nnx.Rngs(0))
    parts = module.split(tower)
    flat = module.flatten(parts.params)
    assert set(flat) == {f"blocks/{i}/kernel" for i in range(11)} | {"heads/depth/kernel"}
    assert set(module.flatten(parts.stats)) == {p.replace("kernel", "mean") for p in flat}
    assert all(isinstance(leaf, jax.Array) for leaf in flat.values())
    assert type(parts.params) is dict and type(parts.params["blocks"]["10"]) is dict
    x = jax.random.normal(jax.random.key(1), (2, 3))
    np.testing.assert_array_equal(module.merge(*parts)(x), Tower(11, 3, nnx.Rngs(0))(x))


def test_keys_of_ten_and_more_blocks_keep_their_place_through_jit():
    parts = module.split(Tower(12, 2, nnx.Rngs(0)))
    numbered = {
        p: jnp.full_like(leaf, i)
        for i, (p, leaf) in enumerate(sorted(module.flatten(parts.params).items()))
    }
    same = jax.jit(lambda p: module.split(module.merge(parts.definition, p, parts.stats)).params)
    out = module.flatten(same(module.unflatten(numbered)))
    assert all(float(out[p][0, 0]) == float(leaf[0, 0]) for p, leaf in numbered.items())


def test_statistics_leave_a_jitted_pass_and_the_given_ones_stay():
    parts = module.split(Tower(2, 3, nnx.Rngs(0)))

    @jax.jit
    def step(params, stats, x):
        tower = module.merge(parts.definition, params, stats)
        y = tower(x)
        return y, module.updated_stats(tower)

    _, stats = step(parts.params, parts.stats, jnp.ones((1, 3)))
    assert all(float(leaf[0]) == 1 for leaf in module.flatten(stats).values())
    assert all(float(leaf[0]) == 0 for leaf in module.flatten(parts.stats).values())


def test_definition_is_hashable_and_independent_of_values():
    one, two = (module.split(Tower(2, 3, nnx.Rngs(seed))).definition for seed in (0, 1))
    assert one == two and hash(one) == hash(two)
    assert one != module.split(Tower(3, 3, nnx.Rngs(0))).definition


def test_abstract_equals_the_built_structure_without_arrays():
    shapes = module.abstract(lambda: Tower(2, 3, nnx.Rngs(0)))
    real = module.split(Tower(2, 3, nnx.Rngs(0)))
    assert shapes.definition == real.definition
    for path, leaf in module.flatten(shapes.params).items():
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert leaf.shape == module.flatten(real.params)[path].shape
    assert module.count(shapes.params) == module.count(real.params) == 27
    created = module.create(lambda: Tower(2, 3, nnx.Rngs(0)))
    assert created.definition == real.definition
    assert module.count(created.params) == 27
    huge = module.abstract(lambda: Tower(2, 200_000, nnx.Rngs(0)))
    assert module.count(huge.params) == 3 * 200_000**2


def test_created_values_are_those_of_optimised_code_bit_for_bit():
    def build():
        return Tower(2, 3, nnx.Rngs(0))

    init = jax.jit(
        lambda: module.split(build())[1:],
        compiler_options={"xla_backend_optimization_level": 3},  # XLA's default, not the tests'
    )
    created = module.create(build)
    jax.tree.map(np.testing.assert_array_equal, (created.params, created.stats), init())


@pytest.mark.parametrize("tree", [{"a": 1}, {"a": {"b": 1, "c": {"0": 2}}, "d": 3}])
def test_flatten_and_unflatten_are_inverse(tree):
    assert module.unflatten(module.flatten(tree)) == tree


def test_layers_are_in_the_order_in_which_people_count():
    paths = ["blocks/1/mlp", "blocks/11/attn", "blocks/11/mlp", "blocks/3/mlp", "head/a"]
    ordered = ["blocks/1/mlp", "blocks/3/mlp", "blocks/11/attn", "blocks/11/mlp", "head/a"]
    assert list(module.in_order(dict.fromkeys(paths, 0))) == ordered
