"""What an expert's function looks like to every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.routing import Routing

Params = Any  # a pytree of arrays with leading axis E (stacked experts) or of one expert


class Linear(Protocol):
    """Multiplies each row by the matrix of the expert that the row belongs to."""

    def __call__(self, x: Array, w: Array, b: Array | None = None) -> Array:
        """`x` [..., D], `w` [D, F] of one expert (or [E, D, F] where rows are mixed), `b` [F]."""
        ...


# One expert's function, `fn(params, x, linear)`: it touches `params` only through `linear`, works
# on each row by itself, perhaps to another width, and closes over no array that is differentiated.
ExpertFn = Callable[[Params, Array, Linear], Array]


class Applied(NamedTuple):
    """What a backend returns: y_ND in the type of x; `dropped` int32, choices that did not fit."""

    y_ND: Array
    dropped: Array


Backend = Callable[[ExpertFn, Params, Array, Routing], Applied]


def dense(x: Array, w: Array, b: Array | None = None) -> Array:
    """The `Linear` of one expert."""
    y = x @ w
    return y if b is None else y + b


def count_experts(params: Params) -> int:
    """E, the length of the leading axis of stacked parameters."""
    return jax.tree.leaves(params)[0].shape[0]


def nothing(fn: ExpertFn, params: Params, x_ND: Array) -> Array:
    """What experts give for no tokens: [0, width of their output], in the type of x."""
    return jnp.zeros((0, output_width(fn, params, x_ND)), x_ND.dtype)


def output_width(fn: ExpertFn, params: Params, x_ND: Array) -> int:
    """The width of what one expert makes of a row of `x_ND`."""
    own = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), params)
    row = jax.ShapeDtypeStruct((1, x_ND.shape[1]), x_ND.dtype)
    return jax.eval_shape(lambda p, x: fn(p, x, dense), own, row).shape[1]
