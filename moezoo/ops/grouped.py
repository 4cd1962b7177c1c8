"""Backends by name: ways to apply stacked experts under a routing, equal in value and gradient.

`ragged` is here: dropless experts through `jax.lax.ragged_dot`, the fast way on TPU. On CPU, and on
GPU without a grouped kernel, XLA multiplies every row by every expert's matrix, E times the useful
work; `blocks` is the backend there. `auto` picks by platform.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import unknown
from moezoo.ops.blocks import blocks
from moezoo.ops.capacity import capacity
from moezoo.ops.dispatch import Slots, combine, sort_by_expert, sorted_slots, spread
from moezoo.ops.expert import (
    Applied,
    Backend,
    ExpertFn,
    ExpertLinear,
    Params,
    count_experts,
    dense,
    nothing,
    platform,
)
from moezoo.ops.routing import Routing, dense_weights


def ragged(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Apply the chosen experts to every token; exact, nothing dropped."""
    n, k = routing.experts_NK.shape
    dropped = jnp.zeros((), jnp.int32)
    if n == 0:
        return Applied(nothing(fn, params, x_ND), dropped)
    plan = sort_by_expert(routing.experts_NK, count_experts(params))
    slots = _whole_tiles(sorted_slots(plan, k))
    linear = _linear(plan.end_E - plan.start_E, slots.choice_S, routing.experts_NK)
    y_SD = fn(params, spread(x_ND, slots), linear)
    y_ND = combine(y_SD, routing.weights_NK, slots)
    return Applied(y_ND.astype(x_ND.dtype), dropped)


# A TPU's kernel for `ragged_dot` takes whole tiles of rows; for other numbers XLA falls back to E
# times the work (libtpu 0.0.42: 5140 rows, 8 experts).
TILE = 16


def _whole_tiles(slots: Slots) -> Slots:
    """Empty slots at the end up to a multiple of `TILE`."""
    rows = slots.choice_S.shape[0]
    if not isinstance(rows, int):  # a symbolic dimension
        return slots
    return slots._replace(choice_S=jnp.pad(slots.choice_S, (0, -rows % TILE), constant_values=-1))


def _linear(sizes_E: Array, choice_S: Array, experts_NK: Array) -> ExpertLinear:
    expert_S = jnp.where(choice_S < 0, -1, experts_NK.reshape(-1)[jnp.maximum(choice_S, 0)])

    def linear(x: Array, w: Array, b: Array | None = None) -> Array:
        y_SF = jax.lax.ragged_dot(x, w, sizes_E)
        if b is None:
            return y_SF
        # A product with one-hot rows: its derivative adds in a fixed order, a gather's may not.
        one_hot_SE = (expert_S[:, None] == jnp.arange(b.shape[0])).astype(b.dtype)
        return y_SF + one_hot_SE @ b

    return linear


__all__ = [
    "BACKENDS",
    "Applied",
    "Backend",
    "ExpertFn",
    "ExpertLinear",
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
