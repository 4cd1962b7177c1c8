"""Choices one by one against a slow oracle, in value and gradient, under every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moezoo.ops import exchange
from moezoo.ops.expert import Backend, ExpertLinear, Params, each_choice, each_input, weighted_sum
from moezoo.ops.grouped import blocks
from tests.ops.cases import LOSSLESS, SHAPES, Shape, arrays, assert_trees_close, problem, router
from tests.ops.test_exchange import mesh_of

LAYER = Shape(n=24, e=4, k=3, d=4, f=7)
SELECT = "softmax_then_top_k"


def first(params: Params, x: jax.Array, linear: ExpertLinear) -> jax.Array:
    return linear(x, params["w1"])


def second(params: Params, x: jax.Array, linear: ExpertLinear) -> jax.Array:
    return linear(x, params["w2"], params["b2"])


def layer(backend: Backend, params, x_ND, routing):
    """Down to F, a function of all of a token's choices between, back to D."""
    q_NKF, dropped = each_choice(backend, first, params, x_ND, routing)
    mixed_NKF = jnp.sin(q_NKF) * jnp.sum(q_NKF, axis=1, keepdims=True)
    y_NKD, again = each_input(backend, second, params, mixed_NKF, routing)
    return weighted_sum(y_NKD, routing), dropped + again


def by_hand(params, x_ND, routing) -> np.ndarray:
    """The same, one token and one choice at a time."""
    y_ND = np.zeros(x_ND.shape)
    for n, (experts, weights) in enumerate(
        zip(np.asarray(routing.experts_NK), np.asarray(routing.weights_NK), strict=True)
    ):
        q = {int(e): x_ND[n] @ params["w1"][e] for e in experts if e >= 0}
        total = sum(q.values())
        for e, weight in zip(experts, weights, strict=True):
            if e >= 0:
                mixed = np.sin(q[int(e)]) * total
                y_ND[n] += weight * (mixed @ params["w2"][e] + params["b2"][e])
    return y_ND


def slopes(backend: Backend):
    """Jitted value and gradients of a loss by everything that is trained."""

    def loss(params, x_ND, weights_NK, routing):
        y_ND, dropped = layer(backend, params, x_ND, routing._replace(weights_NK=weights_NK))
        return jnp.sum(jnp.cos(y_ND)), (y_ND, dropped)

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))


def given(shape: Shape, padded: float):
    p = problem(shape, seed=1, padded=padded)
    routing = router(SELECT, shape.k)(arrays(p.logits_NE), jnp.asarray(p.mask_N))
    return p, routing, (*arrays((p.params, p.x_ND)), routing.weights_NK, routing)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], LAYER], ids=["none", "all", "some"])
def test_every_backend_gives_what_the_loop_gives(shape: Shape) -> None:
    p, routing, args = given(shape, padded=0.2)
    expected_ND = by_hand(p.params, p.x_ND, routing)
    (_, (_, _)), truth = slopes(LOSSLESS["reference"])(*args)
    for name, backend in LOSSLESS.items():
        if name == "batched_blocks" and shape.n == 0:
            continue  # a helper of these tests for layers that keep the width
        (_, (y_ND, dropped)), grads = slopes(backend)(*args)
        assert_trees_close(y_ND, expected_ND, atol=1e-4)
        assert_trees_close(grads, truth, rtol=1e-3, atol=1e-4)
        assert int(dropped) == 0


def test_gradients_against_finite_differences() -> None:
    p, routing, args = given(LAYER, padded=0.0)
    rng = np.random.default_rng(2)
    step = jax.tree.map(lambda a: rng.normal(size=a.shape), (p.params, p.x_ND))

    def moved(h: float) -> float:
        near = jax.tree.map(lambda a, s: a + h * s, (p.params, p.x_ND), step)
        return float(np.sum(np.cos(by_hand(*near, routing))))

    _, grads = slopes(blocks)(*args)
    slope = sum(
        float(np.sum(np.asarray(a, np.float64) * s))
        for a, s in zip(jax.tree.leaves(grads[:2]), jax.tree.leaves(step), strict=True)
    )
    assert slope == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["auto", "all_to_all"])
def test_experts_split_over_devices(name: str) -> None:
    backends = {"auto": exchange.by_name("auto"), "all_to_all": exchange.all_to_all(slots=36)}
    _, _, args = given(LAYER, padded=0.0)
    expected = slopes(blocks)(*args)
    mesh = mesh_of(2, 1, 4)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, P(("data", "fsdp", "expert")))
        params = jax.device_put(args[0], NamedSharding(mesh, P("expert")))
        placed = (params, *jax.device_put(args[1:3], rows), args[3])
        assert_trees_close(slopes(backends[name])(*placed), expected, rtol=1e-3)


def test_padding_and_dropped_choices_give_nothing() -> None:
    p, routing, _ = given(LAYER, padded=0.3)
    spoiled = jnp.where(jnp.asarray(p.mask_N)[:, None], arrays(p.x_ND), jnp.nan)
    run = jax.jit(lambda params, x: each_choice(blocks, first, params, x, routing).y_ND)
    y_NKF = np.asarray(run(arrays(p.params), spoiled))
    assert np.isfinite(y_NKF).all() and not y_NKF[~p.mask_N].any()
