"""Backends that apply stacked experts under a routing; all agree in value and gradient."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import unknown
from moezoo.ops.blocks import blocks
from moezoo.ops.capacity import capacity
from moezoo.ops.expert import Applied, Backend, ExpertFn, Linear, Params, count_experts, dense
from moezoo.ops.platform import platform
from moezoo.ops.ragged import ragged
from moezoo.ops.routing import Routing, dense_weights

__all__ = [
    "BACKENDS",
    "Applied",
    "Backend",
    "ExpertFn",
    "Linear",
    "Params",
    "auto",
    "blocks",
    "by_name",
    "capacity",
    "dense",
    "fastest",
    "ragged",
    "reference",
]


def reference(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Every expert on every token, then the chosen ones: the oracle, E/K times the work."""
    x_ND = jnp.where(routing.mask_N[:, None], x_ND, jnp.zeros((), x_ND.dtype))
    y_END = jax.vmap(lambda p: fn(p, x_ND, dense))(params)
    weights_NE = dense_weights(routing, count_experts(params))
    y_ND = jnp.einsum("ne,end->nd", weights_NE, y_END, preferred_element_type=jnp.float32)
    return Applied(y_ND.astype(x_ND.dtype), jnp.zeros((), jnp.int32))


_announced: set[str] = set()


def announce(line: str) -> None:
    """Say `line` on stderr, once, by the first process of a run."""
    if line not in _announced:
        _announced.add(line)
        if jax.process_index() == 0:
            print(line, file=sys.stderr)


def fastest(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """The dropless backend that is fastest here; says once on stderr which one that is.

    `ragged` on TPU, `blocks` elsewhere.
    """
    target = platform()
    name = "ragged" if target == "tpu" else "blocks"
    announce(f"moezoo: dispatch {name} ({target})")
    return BACKENDS[name](fn, params, x_ND, routing)


def auto(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """`fastest`, or `reference` where there is only one expert, which then has every token."""
    choose = reference if count_experts(params) == 1 else fastest
    return choose(fn, params, x_ND, routing)


BACKENDS: dict[str, Backend] = {
    "reference": reference,
    "capacity": capacity(),
    "blocks": blocks,
    "ragged": ragged,
    "auto": auto,
}


def by_name(name: str) -> Backend:
    """The backend called `name`; raises UserError with the nearest names."""
    if name not in BACKENDS:
        raise unknown("dispatch backend", name, list(BACKENDS))
    return BACKENDS[name]
