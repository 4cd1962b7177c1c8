"""`auto` over an expert axis: few bytes while the load is even, exact whatever it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moezoo.ops import exchange, grouped
from moezoo.ops.flops import product_flops
from moezoo.planning.collectives import collectives, least_bytes, sent
from tests.ops.cases import Shape, arrays, assert_trees_close, mlp, problem
from tests.ops.test_exchange import mesh_of
from tests.ops.test_grouped import routing_of

LAYER = Shape(n=128, e=8, k=1, d=64, f=4)
EVEN = np.arange(LAYER.n)[:, None] % LAYER.e
LOADS = {"even": EVEN, "one expert": EVEN * 0, "padded": np.where(EVEN == 3, -1, EVEN)}


def both(backend, experts_NK: np.ndarray):
    """The jitted layer with its derivatives, (sum, y), dropped, gradients."""
    routing = routing_of(experts_NK, LAYER.e)

    def loss(params, x_ND, weights_NK):
        y_ND, dropped = backend(mlp, params, x_ND, routing._replace(weights_NK=weights_NK))
        return jnp.sum(jnp.sin(y_ND)), (y_ND, dropped)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True)), routing.weights_NK


@pytest.fixture(scope="module")
def given():
    mesh = mesh_of(1, 1, 4)
    p = problem(LAYER, seed=0)
    return mesh, jax.device_put(arrays((p.params, p.x_ND)), NamedSharding(mesh, P("expert")))


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS)
def test_auto_is_exact_for_every_load(load: str, given) -> None:
    mesh, args = given
    plain, weights_NK = both(grouped.reference, LOADS[load])
    expected = plain(*args, weights_NK)
    with jax.set_mesh(mesh):
        step, weights_NK = both(exchange.by_name("auto"), LOADS[load])
        done = step(*args, jax.device_put(weights_NK, NamedSharding(mesh, P("expert"))))
    assert int(done[0][1][1]) == 0, "nothing is dropped"
    assert_trees_close(done, expected, rtol=1e-3)


@pytest.mark.slow
def test_auto_sends_less_than_a_gather(given) -> None:
    mesh, args = given
    found = {}
    for name in ("auto", "gather"):
        with jax.set_mesh(mesh):
            step, weights_NK = both(exchange.by_name(name), EVEN)
            placed = jax.device_put(weights_NK, NamedSharding(mesh, P("expert")))
            traced = step.trace(*args, placed)
            text = traced.lower().compile().as_text()
        found[name] = sent(collectives(text, 4)), product_flops(traced.jaxpr)
    least = 2 * float(least_bytes(EVEN, LAYER.e, 4, 4 * LAYER.d).max())
    assert found["auto"][0] < 0.7 * found["gather"][0]
    assert found["auto"][0] < 2.0 * least  # room for uneven loads, weights and numbers of experts
    assert found["auto"][1] <= found["gather"][1], "what is rare is not counted"
