"""Sparse adapters: a pass is one expert's, the mean of them all is the merged adapter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moezoo.nn import module
from moezoo.nn.adapters import ScaledAdapter
from moezoo.nn.sparse_adapters import SparseAdapters
from moezoo.nn.token_skip import TokenDispatcher, skip_record

X = jax.random.normal(jax.random.key(0), (2, 5, 6))


def made(**changes: str) -> SparseAdapters:
    """With random numbers in every trained array."""
    layer = SparseAdapters(6, 8, 4, dropout=0.0, rngs=nnx.Rngs(0), **changes)
    for i, one in enumerate((layer.down, layer.up)):
        shape = one.kernel.get_value().shape
        one.kernel.set_value(jax.random.normal(jax.random.key(i), shape))
    layer.up.bias.set_value(jax.random.normal(jax.random.key(3), (4, 6)))
    return layer


def test_merged_is_the_mean_of_the_experts() -> None:
    layer = made()
    hidden = jax.nn.relu(layer.down(X, 0))
    every = [layer.scale * layer.up(hidden, e) for e in range(4)]
    np.testing.assert_allclose(layer(X), jnp.stack(every).mean(0), rtol=1e-4, atol=1e-6)
    left = layer.of_task(1)
    assert isinstance(left, ScaledAdapter)
    np.testing.assert_allclose(left(X), layer(X), rtol=1e-6)


def test_a_pass_is_one_experts() -> None:
    layer = made()
    hidden = jax.nn.relu(layer.down(X, 0))
    every = [np.asarray(layer.scale * layer.up(hidden, e)) for e in range(4)]
    drawn = set()
    for seed in range(20):
        y = np.asarray(layer(X, jax.random.key(seed)))
        (expert,) = [e for e in range(4) if np.allclose(every[e], y, rtol=1e-5, atol=1e-6)]
        drawn.add(expert)
    assert drawn == {0, 1, 2, 3}


def test_a_pass_moves_the_experts_own_entries_only() -> None:
    layer = made(shared="none")
    parts = module.split(layer)

    def loss(params: dict, key: jax.Array) -> jax.Array:
        return (module.merge(parts.definition, params, parts.stats)(X, key) ** 2).sum()

    grads = jax.grad(loss)(parts.params, jax.random.key(0))
    for name in ("down", "up"):
        owner = np.asarray(parts.stats[name]["owner"])
        moved = set(owner[np.asarray(grads[name]["kernel"]) != 0].tolist())
        assert len(moved) == 1
    assert "owner" not in module.flatten(parts.params)


def test_union_is_as_many_times_the_mean_as_there_are_experts() -> None:
    mean, union = made(), made(merge="union")
    zero = jnp.zeros((4, 6))
    mean.up.bias.set_value(zero)
    union.up.bias.set_value(zero)
    np.testing.assert_allclose(union(X), 4 * mean(X), rtol=1e-4)


def test_a_fresh_adapter_gives_nothing() -> None:
    layer = SparseAdapters(6, 8, 4, rngs=nnx.Rngs(0))
    assert not np.asarray(layer(X)).any() and not np.asarray(layer(X, jax.random.key(0))).any()


@pytest.mark.parametrize("key", [None, jax.random.key(5)])
def test_a_dispatchers_record_counts_what_is_computed(key: jax.Array | None) -> None:
    gate = TokenDispatcher(6, rngs=nnx.Rngs(0))(X, key)
    record = skip_record(gate)
    assert int(record.routing.experts_NK.sum()) == int((gate.keep_BT > 0.5).sum())
    np.testing.assert_allclose(record.routing.probs_NE.sum(-1), 1, rtol=1e-6)
