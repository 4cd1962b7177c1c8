"""Backends by name: ways to apply stacked experts under a routing, equal in value and gradient.

Dropless backends of sorted rows are here. `ragged` multiplies them by `jax.lax.ragged_dot`, the
fast way on TPU; on CPU and GPU XLA multiplies every row by every expert's matrix, E times the
useful work. `kernels` multiplies them in blocks of one expert each by kernels of our own, the fast
way on NVIDIA GPUs (`grouped_matmul`). `auto` picks by platform.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Event
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.ops.blocks import blocks
from moezoo.ops.capacity import capacity
from moezoo.ops.dispatch import (
    Slots,
    Sorted,
    block_slots,
    combine,
    sort_by_expert,
    sorted_slots,
    spread,
)
from moezoo.ops.expert import (
    Activation,
    Applied,
    Backend,
    ExpertFn,
    ExpertLinear,
    Params,
    count_experts,
    dense,
    nothing,
    nvidia,
    platform,
)
from moezoo.ops.routing import Routing, dense_weights

# A TPU's kernel for `ragged_dot` takes whole tiles of rows; for other numbers XLA falls back to E
# times the work (libtpu 0.0.42: 5140 rows, 8 experts).
TILE = 16


# Rows [S, D] in groups, matrices [E, D, F] and the sizes of the groups [E] to products [S, F].
RaggedDot = Callable[[Array, Array, Array], Array]


def ragged(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Sort, run every expert on its rows by `jax.lax.ragged_dot`, and add up."""
    return by_ragged_dot(jax.lax.ragged_dot, fn, params, x_ND, routing)


def by_ragged_dot(
    product: RaggedDot, fn: ExpertFn, params: Params, x_ND: Array, routing: Routing
) -> Applied:
    """`ragged` by any function with the form of `jax.lax.ragged_dot`."""
    n, k = routing.experts_NK.shape
    dropped = jnp.zeros((), jnp.int32)
    if n == 0:
        return Applied(nothing(fn, params, x_ND), dropped)
    plan = sort_by_expert(routing.experts_NK, count_experts(params))
    slots = _whole_tiles(sorted_slots(plan, k), TILE)
    y_SD = fn(params, spread(x_ND, slots), _ragged_dot(product, plan, slots, routing))
    y_ND = combine(y_SD, routing.weights_NK, slots)
    return Applied(y_ND.astype(x_ND.dtype), dropped)


def _whole_tiles(slots: Slots, tile: int) -> Slots:
    """Empty slots at the end up to a multiple of `tile`."""
    rows = slots.choice_S.shape[0]
    if not isinstance(rows, int):  # a symbolic dimension
        return slots
    return slots._replace(choice_S=jnp.pad(slots.choice_S, (0, -rows % tile), constant_values=-1))


def _ragged_dot(product: RaggedDot, plan: Sorted, slots: Slots, routing: Routing) -> ExpertLinear:
    choice_S, experts_NK = slots.choice_S, routing.experts_NK
    sizes_E = plan.end_E - plan.start_E
    expert_S = jnp.where(choice_S < 0, -1, experts_NK.reshape(-1)[jnp.maximum(choice_S, 0)])

    def linear(
        x: Array,
        w: Array,
        b: Array | None = None,
        activation: Activation | None = None,
        up: Array | None = None,
    ) -> Array:
        y_SF = product(x, w, sizes_E)
        if b is not None:
            # A product with one-hot rows: its derivative adds in a fixed order, a gather's may not.
            y_SF += (expert_S[:, None] == jnp.arange(b.shape[0])).astype(b.dtype) @ b
        y_SF = y_SF if activation is None else activation(y_SF)
        return y_SF if up is None else y_SF * product(x, up, sizes_E)

    return linear


class Ways(NamedTuple):
    """How tokens get to their slots, and come back as weighted sums (`dispatch`); gated products.

    gated: `gated_matmul`, or None: two products that meet afterwards.
    """

    spread: Callable[[Array, Slots], Array]
    combine: Callable[[Array, Array, Slots], Array]
    gated: Callable[..., Array] | None


def kernels(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Sort into blocks, multiply them by the kernels for NVIDIA GPUs, and add up; dropless.

    Where the number of tokens is not known, as in a program that is exported for any, and where
    there are none: `blocks`, which has the same results. Raises UserError on a TPU.
    """
    return _by_kernels("kernels", _measured, fn, params, x_ND, routing)


def fused(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """`kernels` in fewer passes, which no card has timed yet.

    Kernels move tokens, too (`triton_rows`), and make gated experts' two products at once
    (`gated_matmul`).
    """
    return _by_kernels("fused", _in_one_pass, fn, params, x_ND, routing)


def _measured() -> Ways:
    return Ways(spread, combine, None)


def _in_one_pass() -> Ways:
    from moezoo.ops import triton_rows  # Pallas costs half a second
    from moezoo.ops.gated_matmul import gated_matmul

    return Ways(triton_rows.spread, triton_rows.combine, gated_matmul)


def _by_kernels(
    name: str,
    ways: Callable[[], Ways],
    fn: ExpertFn,
    params: Params,
    x_ND: Array,
    routing: Routing,
) -> Applied:
    if platform() == "tpu":
        raise UserError(f"The dispatch {name} is for NVIDIA GPUs: take auto or ragged on a TPU.")
    n, k = routing.experts_NK.shape
    if not isinstance(n, int) or n == 0:
        return blocks(fn, params, x_ND, routing)
    from moezoo.ops.grouped_matmul import Groups, grouped_matmul, rows_of_block
    from moezoo.ops.kernel_activations import fuses

    experts = count_experts(params)
    plan = sort_by_expert(routing.experts_NK, experts)
    slots, *blocks_of = block_slots(plan, k, rows_of_block(n * k, experts))
    way, groups = ways(), Groups(*blocks_of)

    def linear(
        x: Array,
        w: Array,
        b: Array | None = None,
        activation: Activation | None = None,
        up: Array | None = None,
    ) -> Array:
        if way.gated and up is not None and b is None and activation and fuses(activation):
            return way.gated(x, w, up, groups, activation)
        y_SF = grouped_matmul(x, w, b, groups, activation)
        return y_SF if up is None else y_SF * grouped_matmul(x, up, None, groups)

    y_SD = fn(params, way.spread(x_ND, slots), linear)
    y_ND = way.combine(y_SD, routing.weights_NK, slots)
    return Applied(y_ND.astype(x_ND.dtype), jnp.zeros((), jnp.int32))


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
    "fused",
    "kernels",
    "ragged",
    "reference",
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
_heard = Event()


def speak_of_choices() -> None:
    """Let `announce` be heard in this process: by training, benchmarks, and whoever asks for it."""
    _heard.set()


def announce(line: str) -> None:
    """Say `line` on stderr, once, by the first process of a run, where choices are spoken of."""
    if _heard.is_set() and line not in _announced:
        _announced.add(line)
        if jax.process_index() == 0:
            print(line, file=sys.stderr)


def split_by_compiler() -> bool:
    """Whether the current mesh has an axis of several parts that no `shard_map` has split yet."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(size > 1 and axis not in mesh.manual_axes for axis, size in mesh.shape.items())


def fastest(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """The dropless backend that is fastest here; announces which one that is.

    `ragged` on TPU, `kernels` on NVIDIA GPUs, `blocks` elsewhere. `fused` ran in an interpreter
    only so far, so it is not chosen.
    """
    target = platform()
    # Compilers cannot split a kernel, and would bring all its rows to every device.
    on_gpu = "kernels" if nvidia() and not split_by_compiler() else "blocks"
    name = {"tpu": "ragged", "gpu": on_gpu}.get(target, "blocks")
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
    "kernels": kernels,
    "fused": fused,
    "auto": auto,
}


def by_name(name: str) -> Backend:
    """The backend called `name`; raises UserError with the nearest names."""
    if name not in BACKENDS:
        raise unknown("dispatch backend", name, list(BACKENDS))
    return BACKENDS[name]
