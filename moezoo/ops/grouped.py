"""Backends by name: ways to apply stacked experts under a routing, equal in value and gradient.

Dropless backends of sorted rows are here. `ragged` multiplies them by `jax.lax.ragged_dot`, the
fast way on TPU; on CPU and GPU XLA multiplies every row by every expert's matrix, E times the
useful work. `triton` multiplies them by kernels of our own for NVIDIA GPUs (`grouped_matmul`).
`auto` picks by platform.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.ops.blocks import blocks
from moezoo.ops.capacity import capacity
from moezoo.ops.dispatch import Slots, Sorted, combine, sort_by_expert, sorted_slots, spread
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


class SortedRows(NamedTuple):
    """Choices in order of expert: their groups, their slots, the routing that they come from."""

    plan: Sorted
    slots: Slots
    routing: Routing


def _of_sorted_rows(make: Callable[[SortedRows], ExpertLinear], tile: int) -> Backend:
    """Sort, run every expert on its rows by the product that `make` gives, and add up.

    tile: the number of rows is padded to a multiple of it.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        dropped = jnp.zeros((), jnp.int32)
        if n == 0:
            return Applied(nothing(fn, params, x_ND), dropped)
        plan = sort_by_expert(routing.experts_NK, count_experts(params))
        slots = _whole_tiles(sorted_slots(plan, k), tile)
        y_SD = fn(params, spread(x_ND, slots), make(SortedRows(plan, slots, routing)))
        y_ND = combine(y_SD, routing.weights_NK, slots)
        return Applied(y_ND.astype(x_ND.dtype), dropped)

    return apply


def _whole_tiles(slots: Slots, tile: int) -> Slots:
    """Empty slots at the end up to a multiple of `tile`."""
    rows = slots.choice_S.shape[0]
    if not isinstance(rows, int):  # a symbolic dimension
        return slots
    return slots._replace(choice_S=jnp.pad(slots.choice_S, (0, -rows % tile), constant_values=-1))


def _ragged_dot(rows: SortedRows) -> ExpertLinear:
    choice_S, experts_NK = rows.slots.choice_S, rows.routing.experts_NK
    sizes_E = rows.plan.end_E - rows.plan.start_E
    expert_S = jnp.where(choice_S < 0, -1, experts_NK.reshape(-1)[jnp.maximum(choice_S, 0)])

    def linear(x: Array, w: Array, b: Array | None = None) -> Array:
        y_SF = jax.lax.ragged_dot(x, w, sizes_E)
        if b is None:
            return y_SF
        # A product with one-hot rows: its derivative adds in a fixed order, a gather's may not.
        one_hot_SE = (expert_S[:, None] == jnp.arange(b.shape[0])).astype(b.dtype)
        return y_SF + one_hot_SE @ b

    return linear


def _kernels(rows: SortedRows) -> ExpertLinear:
    if platform() == "tpu":
        raise UserError("The dispatch triton is for NVIDIA GPUs: take auto or ragged on a TPU.")
    from moezoo.ops.grouped_matmul import Groups, grouped_matmul  # Pallas costs half a second

    groups = Groups(rows.plan.start_E, rows.plan.end_E)

    def linear(x: Array, w: Array, b: Array | None = None) -> Array:
        return grouped_matmul(x, w, b, groups)

    return linear


# A TPU's kernel for `ragged_dot` takes whole tiles of rows; for other numbers XLA falls back to E
# times the work (libtpu 0.0.42: 5140 rows, 8 experts).
ragged = _of_sorted_rows(_ragged_dot, 16)
# The largest tile of rows in `grouped_matmul.TILES`: padded here, rows are not padded again there.
triton = _of_sorted_rows(_kernels, 128)


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
    "triton",
]


def reference(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Every expert on every token, then the chosen ones: the oracle, E/K times the work."""
    # Weight 0 is not enough where every expert sees every token: 0 times NaN is NaN.
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

    `ragged` on TPU, `blocks` elsewhere: `triton` was not timed on a GPU yet.
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
    "triton": triton,
    "auto": auto,
}


def by_name(name: str) -> Backend:
    """The backend called `name`; raises UserError with the nearest names."""
    if name not in BACKENDS:
        raise unknown("dispatch backend", name, list(BACKENDS))
    return BACKENDS[name]
