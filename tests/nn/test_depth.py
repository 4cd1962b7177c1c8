"""Layers in a loop against layers written out: values, gradients, records, randomness."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo.nn import depth, module
from moezoo.nn.context import Context, LayerOutput, apply_linear
from moezoo.nn.layers import Linear

D = 3


class Noisy(nnx.Module):
    """A linear layer that adds noise of its own key and reports what it got."""

    wants_context = True

    def __init__(self, rngs: nnx.Rngs):
        self.linear = Linear(D, D, rngs=rngs)

    def __call__(self, x, context):
        y = jnp.tanh(self.linear(x)) + jax.random.normal(context.key, x.shape)
        return LayerOutput(y, {"sum": y.sum(), "rows": y[:, 0]})


class Layer(nnx.Module):
    def __init__(self, noisy: bool, rngs: nnx.Rngs):
        self.inner = Noisy(rngs) if noisy else Linear(D, D, rngs=rngs)


class Layers(nnx.Module):
    def __init__(self, noisy: list[bool]):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List(Layer(each, rngs) for each in noisy)


def step(layer, x, context):
    return x + apply_linear(layer.inner, x, context, "inner")


def results(run, remember, definition, params, x):
    def loss(params, x):
        net = module.merge(definition, params, {})
        context = Context(key=jax.random.key(3), path="net")
        y = run(net.layers, step, x, context, remember=remember)
        return jnp.sum(jnp.sin(y)), (y, context.records)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)


@pytest.mark.slow
@pytest.mark.parametrize("remember", [depth.everything, jax.checkpoint])
@settings(max_examples=6)
@given(noisy=st.lists(st.booleans(), min_size=1, max_size=4), rows=st.integers(1, 2))
def test_a_loop_computes_what_layers_written_out_compute(remember, noisy, rows):
    parts = module.split(Layers(noisy))
    x = jnp.asarray(np.random.default_rng(rows).standard_normal((rows, D)), jnp.float32)
    asked = partial(results, definition=parts.definition, params=parts.params, x=x)
    wanted = asked(depth.unrolled, depth.everything)
    found = asked(depth.scanned, remember)
    assert set(found[0][1][1]) == {f"net/layers/{i}/inner" for i, each in enumerate(noisy) if each}
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found, wanted)


def test_every_layer_has_randomness_of_its_own():
    net = Layers([True, True])
    context = Context(key=jax.random.key(0))
    depth.scanned(net.layers, step, jnp.zeros((2, D)), context)
    first, second = context.records["layers/0/inner"], context.records["layers/1/inner"]
    assert not np.allclose(first["rows"], second["rows"])


def test_a_loop_holds_one_layer_however_many_there_are():
    def operations(run, count):
        net = Layers([False] * count)
        parts = module.split(net)

        def whole(params, x):
            return run(module.merge(parts.definition, params, {}).layers, step, x, Context())

        text = jax.jit(whole).lower(parts.params, jnp.zeros((2, D))).as_text()
        return text.count("dot_general")

    assert [operations(depth.unrolled, n) for n in (2, 6)] == [2, 6]
    assert [operations(depth.scanned, n) for n in (2, 6)] == [1, 1]
