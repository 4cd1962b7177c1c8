"""Random MoE layers for the tests of this folder; jitted functions are shared between them."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.ops import blocks as blocks_ops
from moezoo.ops.capacity import capacity
from moezoo.ops.dispatch import sort_by_expert
from moezoo.ops.expert import Applied, Backend, ExpertFn, ExpertLinear, Params, count_experts
from moezoo.ops.grouped import blocks, fused, kernels, ragged, reference
from moezoo.ops.routing import SELECTIONS, Routing, route


class Shape(NamedTuple):
    """N tokens, E experts, K per token, width D, hidden F."""

    n: int
    e: int
    k: int
    d: int
    f: int


SHAPES = [
    Shape(0, 3, 2, 4, 5),
    Shape(1, 1, 1, 3, 2),
    Shape(6, 4, 4, 3, 5),
    Shape(45, 5, 2, 4, 3),
]


class Problem(NamedTuple):
    """float64 NumPy arrays of one random layer; `mask_N` False = padding."""

    params: dict[str, np.ndarray]
    x_ND: np.ndarray
    logits_NE: np.ndarray
    mask_N: np.ndarray


def problem(shape: Shape, seed: int, padded: float = 0.0) -> Problem:
    """A random layer; a share `padded` of its tokens is padding."""
    rng = np.random.default_rng(seed)
    n, e, _, d, f = shape

    def draw(*size: int) -> np.ndarray:
        return rng.normal(size=size).astype(np.float32).astype(np.float64)

    params = {"w1": draw(e, d, f), "b1": draw(e, f), "w2": draw(e, f, d), "b2": draw(e, d)}
    return Problem(params, draw(n, d), draw(n, e), rng.random(n) >= padded)


def mlp(params: Params, x: Array, linear: ExpertLinear) -> Array:
    hidden = jax.nn.gelu(linear(x, params["w1"], params["b1"]), approximate=False)
    return linear(hidden, params["w2"], params["b2"])


def batched_blocks(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """The form of `blocks` that other platforms than the CPU run."""
    if x_ND.shape[0] == 0:
        return Applied(jnp.zeros_like(x_ND), jnp.zeros((), jnp.int32))
    plan = sort_by_expert(routing.experts_NK, count_experts(params))
    y_ND = blocks_ops.forward_at_once(fn, params, x_ND, routing.weights_NK, plan)
    return Applied(y_ND.astype(x_ND.dtype), jnp.zeros((), jnp.int32))


def roomy_capacity(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Capacity at which nothing can be dropped: a slot for every token."""
    return capacity(slots=max(x_ND.shape[0], 1))(fn, params, x_ND, routing)


# Every backend that must agree with the oracle in value and gradient.
LOSSLESS: dict[str, Backend] = {
    "reference": reference,
    "capacity": roomy_capacity,
    "blocks": blocks,
    "batched_blocks": batched_blocks,
    "ragged": ragged,
    "kernels": kernels,
    "fused": fused,
}


class Gradients(NamedTuple):
    """Output and derivatives of sum(cotangent * y) by everything a backend is given."""

    y_ND: Array
    dropped: Array
    dparams: Params
    dx_ND: Array
    dweights_NK: Array


@cache
def runner(name: str) -> Any:
    """Jitted (params, x_ND, routing, cotangent_ND) -> Gradients of a backend."""
    backend = LOSSLESS[name]

    def run(params: Params, x_ND: Array, routing: Routing, cotangent_ND: Array) -> Gradients:
        def value(params: Params, x_ND: Array, weights_NK: Array):
            return backend(mlp, params, x_ND, routing._replace(weights_NK=weights_NK))

        args = (params, x_ND, routing.weights_NK)
        y_ND, pull, dropped = jax.vjp(lambda *a: tuple(value(*a)), *args, has_aux=True)
        return Gradients(y_ND, dropped, *pull(cotangent_ND.astype(y_ND.dtype)))

    return jax.jit(run)


@cache
def router(name: str, k: int) -> Any:
    """Jitted (logits_NE, mask_N) -> Routing under the selection called `name`."""
    return jax.jit(lambda logits, mask: route(logits, k=k, select=SELECTIONS[name], mask_N=mask))


def arrays(tree: Any, dtype: Any = jnp.float32) -> Any:
    """NumPy leaves as JAX arrays of `dtype`."""
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


def assert_trees_close(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol)
