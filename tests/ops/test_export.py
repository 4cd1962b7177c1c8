"""Backends inside `jax.export`: any number of tokens, several platforms in one program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from moezoo.errors import UserError
from moezoo.ops.grouped import BACKENDS
from moezoo.ops.routing import route
from tests.ops.cases import Shape, arrays, assert_trees_close, mlp, problem

LAYER = Shape(n=7, e=4, k=2, d=3, f=5)


@pytest.mark.parametrize("name", ["reference", "blocks", "ragged", "auto"])
def test_symbolic_tokens_and_three_platforms(name: str) -> None:
    p = problem(LAYER, seed=0)
    router_DE = arrays(np.random.default_rng(1).normal(size=(LAYER.d, LAYER.e)))

    def layer(params, x_ND):
        routing = route(x_ND @ router_DE, k=LAYER.k)
        return BACKENDS[name](mlp, params, x_ND, routing).y_ND

    (n,) = export.symbolic_shape("n")
    params = arrays(p.params)
    x_ND = jax.ShapeDtypeStruct((n, LAYER.d), jnp.float32)
    program = export.export(jax.jit(layer), platforms=("cpu", "cuda", "tpu"))(params, x_ND)
    again = export.deserialize(program.serialize())
    for tokens in (1, LAYER.n):
        x_ND = arrays(p.x_ND[:tokens])
        assert_trees_close(again.call(params, x_ND), jax.jit(layer)(params, x_ND))


def test_capacity_needs_a_fixed_number_of_tokens() -> None:
    p = problem(LAYER, seed=0)

    def layer(x_ND):
        routing = route(x_ND @ jnp.ones((LAYER.d, LAYER.e)), k=LAYER.k)
        return BACKENDS["capacity"](mlp, arrays(p.params), x_ND, routing).y_ND

    x_ND = jax.ShapeDtypeStruct((*export.symbolic_shape("n"), LAYER.d), jnp.float32)
    with pytest.raises(UserError, match="fixed number of tokens"):
        export.export(jax.jit(layer))(x_ND)
