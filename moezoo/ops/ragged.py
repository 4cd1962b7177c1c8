"""Dropless experts through `jax.lax.ragged_dot`: the fast way on TPU.

On CPU, and on GPU without a grouped kernel, XLA multiplies every row by every expert's matrix,
E times the useful work; `blocks` is the backend there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.dispatch import Slots, combine, sort_by_expert, sorted_slots, spread
from moezoo.ops.expert import Applied, ExpertFn, Linear, Params, count_experts, nothing
from moezoo.ops.routing import Routing


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


def _linear(sizes_E: Array, choice_S: Array, experts_NK: Array) -> Linear:
    expert_S = jnp.where(choice_S < 0, -1, experts_NK.reshape(-1)[jnp.maximum(choice_S, 0)])

    def linear(x: Array, w: Array, b: Array | None = None) -> Array:
        y_SF = jax.lax.ragged_dot(x, w, sizes_E)
        if b is None:
            return y_SF
        # A product with one-hot rows: its derivative adds in a fixed order, a gather's may not.
        one_hot_SE = (expert_S[:, None] == jnp.arange(b.shape[0])).astype(b.dtype)
        return y_SF + one_hot_SE @ b

    return linear
