"""The same value and gradient on 1, 2 and 4 parts of an axis of virtual devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moezoo.ops.capacity import capacity
from moezoo.ops.exchange import per_device
from moezoo.ops.grouped import blocks, ragged
from moezoo.ops.routing import constant_noise, learned_noise, route
from tests.fixtures import devices
from tests.ops.cases import Shape, arrays, assert_trees_close, mlp, problem

AXES = ("data", "fsdp", "expert", "tensor")
NOISE = constant_noise(1.0)
LAYER = Shape(n=48, e=4, k=2, d=3, f=5)


def mesh_of(data: int, fsdp: int, expert: int, tensor: int = 1) -> jax.sharding.Mesh:
    sizes = (data, fsdp, expert, tensor)
    own = devices(int(np.prod(sizes)))
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 4, devices=own)


def value_and_slopes(backend, noise=NOISE):
    """Jitted loss of a layer with its router, by everything that is trained."""

    def loss(params, router_DE, x_ND, mask_N):
        logits_NE = jnp.where(mask_N[:, None], x_ND, 0.0) @ router_DE
        eps_NE = jnp.cos(jnp.arange(logits_NE.size, dtype=jnp.float32)).reshape(logits_NE.shape)
        routing = route(logits_NE, k=LAYER.k, noise=noise, eps_NE=eps_NE, mask_N=mask_N)
        y_ND, dropped = backend(mlp, params, x_ND, routing)
        return jnp.sum(jnp.sin(y_ND)), (y_ND, dropped)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def layer_args(n: int = LAYER.n):
    p = problem(LAYER._replace(n=n), seed=0, padded=0.2)
    router_DE = np.random.default_rng(1).normal(size=(LAYER.d, LAYER.e))
    return (*arrays((p.params, router_DE, p.x_ND)), jnp.asarray(p.mask_N))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (1, 1, 4), (2, 1, 4), (1, 2, 2, 2)])
def test_per_device_equals_one_device(sizes: tuple[int, ...]) -> None:
    args = layer_args()
    expected = value_and_slopes(blocks)(*args)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp", "expert")))
        experts = NamedSharding(mesh, P("expert"))
        params, router_DE, x_ND, mask_N = args
        placed = (jax.device_put(params, experts), router_DE, *jax.device_put((x_ND, mask_N), rows))
        done = value_and_slopes(per_device(blocks))(*placed)
    assert_trees_close(done, expected, rtol=1e-3)
    split = int(np.prod(sizes[:3]))
    assert len(done[0][1][0].sharding.device_set) == int(np.prod(sizes))
    text = str(jax.make_jaxpr(value_and_slopes(per_device(blocks)))(*args))
    assert "shard_map" not in text  # outside the mesh it is the backend itself
    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(value_and_slopes(per_device(blocks)))(*args))
    assert ("shard_map" in text) == (split > 1)


@pytest.mark.slow
def test_noise_of_every_token_travels_with_it() -> None:
    args = layer_args()
    noise = learned_noise(jax.random.normal(jax.random.key(0), (LAYER.n, LAYER.e)))
    expected = value_and_slopes(ragged, noise)(*args)
    with jax.set_mesh(mesh_of(2, 1, 2)):
        done = value_and_slopes(per_device(ragged), noise)(*args)
    assert_trees_close(done, expected, rtol=1e-3)


@pytest.mark.slow
def test_tokens_that_cannot_be_split_evenly() -> None:
    args = layer_args(n=47)
    expected = value_and_slopes(blocks)(*args)
    with jax.set_mesh(mesh_of(2, 1, 2)):
        done = value_and_slopes(per_device(blocks))(*args)
    assert_trees_close(done, expected, rtol=1e-3)


@pytest.mark.slow
def test_dropped_choices_of_all_devices_are_counted() -> None:
    args = layer_args()
    with jax.set_mesh(mesh_of(1, 1, 4)):
        done = value_and_slopes(per_device(capacity(slots=1)))(*args)
    real = int(np.sum(args[-1]))
    kept = 4 * LAYER.e  # four devices, one slot per expert each, all in use
    assert int(done[0][1][1]) == real * LAYER.k - kept
