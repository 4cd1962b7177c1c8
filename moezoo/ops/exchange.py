"""Experts on several devices: split over the mesh axis `expert`, or copied to every device.

Tokens are split over all of `data`, `fsdp` and `expert`. With an `expert` axis of more than one
device each device holds E / P of the experts and tokens travel to them and back:

- `gather` brings all tokens of an expert group to each of its devices: exact, and what `auto`
  and the names of dropless backends stand for;
- `all_to_all` sends buffers of fixed size: the least traffic that every platform can do, and a
  load that is too uneven drops choices (counted);
- `ragged_all_to_all` sends what there is into a bounded buffer (TPU and GPU).

Without such an axis all of them are the plain backend on each device's own tokens. Where tokens
cannot be split evenly, and inside another `shard_map`, they are the plain backend as it stands,
which the compiler then partitions in its own way, gathering the experts where it must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from moezoo.errors import UserError, unknown
from moezoo.ops import grouped
from moezoo.ops.all_to_all import ACROSS, exchanged
from moezoo.ops.capacity import HERE, Priority, Stacked, by_position, capacity
from moezoo.ops.expert import Applied, Backend, ExpertFn, Params, count_experts
from moezoo.ops.gather import gathered
from moezoo.ops.platform import platform
from moezoo.ops.ragged_exchange import ragged_exchanged
from moezoo.ops.routing import Routing
from moezoo.ops.visits import EXPERT, check_room

AXES = ("data", "fsdp", EXPERT)
EVERYWHERE = PartitionSpec()


def per_device(backend: Backend, axes: tuple[str, ...] = AXES) -> Backend:
    """Run `backend` on each device's own tokens, with all experts gathered there.

    The tokens are split over those of `axes` that the mesh of `jax.set_mesh` has; sorting and
    looping then stay inside a device. Without a mesh, on one device, or where the tokens cannot be
    split evenly, this is `backend` itself, as it is inside another `shard_map`. A backend that may
    drop choices does so by the tokens of one device.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        split = _axes_to_split(axes)
        if not split or not _splits(x_ND, split):
            return backend(fn, params, x_ND, routing)
        whole = jax.tree.map(lambda a: EVERYWHERE, params)
        return _on_devices(backend, split, whole, fn, params, x_ND, routing)

    return apply


def gather(local: Backend = grouped.fastest) -> Backend:
    """Experts split over the axis `expert`, tokens gathered to them; exact (`ops.gather`).

    `local` applies the experts of one device and sees many tokens that have none of them.
    """
    return _over_experts("gather", gathered(local), local)


def all_to_all(
    factor: float = 1.15,
    *,
    slots: int | None = None,
    local: Backend = grouped.auto,
    priority: Priority = by_position,
) -> Backend:
    """Experts split over the axis `expert`, buffers of fixed size (`ops.all_to_all.exchanged`).

    `factor` times what an even load needs, or exactly `slots` tokens from one device to another;
    choices that do not fit are dropped and counted. `local` applies the experts of one device.
    """
    check_room(factor, slots)
    return _over_experts("all_to_all", exchanged(local, factor, slots, priority), local)


def ragged_all_to_all(
    factor: float = 2.0, *, rows: int | None = None, local: Backend = grouped.auto
) -> Backend:
    """Experts split over the axis `expert`, rows sent as they are (`ops.ragged_exchange`).

    A device takes `factor` times an even share of visits, or exactly `rows`; choices beyond that
    are dropped and counted. Raises UserError on CPU, where XLA has no such operation.
    """
    check_room(factor, rows)
    sharded = ragged_exchanged(local, factor, rows)
    return _over_experts("ragged_all_to_all", sharded, local, _needs_ragged)


def with_capacity(make: Callable[[Stacked], Backend]) -> Backend:
    """Experts with a fixed number of slots, on any mesh; `make(stacked)` is the backend that says
    how many there are and who gets them, by the tokens of one device.
    """
    return _over_experts("capacity", make(ACROSS), make(HERE))


Check = Callable[[str], None]


def _over_experts(
    name: str, sharded: Backend, local: Backend, check: Check = lambda name: None
) -> Backend:
    """`sharded` inside a `shard_map` over split experts; `local` where there is no expert axis."""
    alone = per_device(local)

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        split = _axes_to_split(AXES)
        if EXPERT not in split:
            return alone(fn, params, x_ND, routing)
        mesh = jax.sharding.get_abstract_mesh()
        experts, devices = count_experts(params), mesh.shape[EXPERT]
        if experts % devices:
            raise UserError(
                f"{experts} experts do not split evenly over mesh.expert={devices} devices: take "
                "a size of the expert axis that divides the number of experts."
            )
        check(platform())
        if not _splits(x_ND, split):
            return alone(fn, params, x_ND, routing)
        grouped.announce(f"moezoo: exchange {name} (expert={devices})")
        own = jax.tree.map(_own_experts, params)
        return _on_devices(sharded, split, own, fn, params, x_ND, routing)

    return apply


def _needs_ragged(name: str) -> None:
    if name == "cpu":
        raise UserError(
            "XLA has no ragged_all_to_all on CPU: take the dispatch gather or all_to_all there."
        )


def _on_devices(
    backend: Backend,
    split: tuple[str, ...],
    specs: Any,
    fn: ExpertFn,
    params: Params,
    x_ND: Array,
    routing: Routing,
) -> Applied:
    """`backend` on every device: rows over `split`, parameters as the tree `specs` says."""

    def body(params: Params, x_ND: Array, routing: Routing) -> tuple[Array, Array]:
        own = jax.tree.map(_join_fsdp, params, specs)
        y_ND, dropped = backend(fn, own, x_ND, routing)
        return y_ND, jax.lax.psum(dropped, split)

    rows = PartitionSpec(split)
    scale_NE = jnp.broadcast_to(routing.noise_scale_NE, routing.logits_NE.shape)
    on_each_device = jax.shard_map(
        body,
        in_specs=(specs, rows, rows),
        out_specs=(rows, EVERYWHERE),
        axis_names=set(split),
        check_vma=False,
    )
    return Applied(*on_each_device(params, x_ND, routing._replace(noise_scale_NE=scale_NE)))


def _own_experts(stack: Array) -> PartitionSpec:
    """Experts [E, ...] over `expert`, and matrices over `fsdp` where the mesh has that axis."""
    parts = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    if parts == 1 or stack.ndim < 3:
        return PartitionSpec(EXPERT)
    dimension = dimension_to_split(stack.shape[1:], parts)
    if stack.shape[1 + dimension] % parts:
        return PartitionSpec(EXPERT)
    return PartitionSpec(EXPERT, *(None,) * dimension, "fsdp")


def _join_fsdp(part: Array, spec: PartitionSpec) -> Array:
    """Whole matrices; in the open, because its derivative is then a psum_scatter, half the
    traffic of the all-reduce that compilers make of a gather at the border of a `shard_map`.
    """
    if "fsdp" not in spec:
        return part
    return jax.lax.all_gather(part, "fsdp", axis=spec.index("fsdp"), tiled=True)


def dimension_to_split(shape: tuple[int, ...], parts: int) -> int:
    """The largest dimension that `parts` divides, else the largest."""
    return max(range(len(shape)), key=lambda i: (shape[i] % parts == 0, shape[i]))


def _axes_to_split(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `axes` that the current mesh has, in more than one part and not yet split."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {axis for axis in mesh.axis_names if axis not in mesh.manual_axes}
    return tuple(axis for axis in axes if axis in free and mesh.shape[axis] > 1)


def _splits(x_ND: Array, split: tuple[str, ...]) -> bool:
    """Whether there are tokens and they split evenly over these axes."""
    mesh = jax.sharding.get_abstract_mesh()
    n = x_ND.shape[0]
    return isinstance(n, int) and n > 0 and n % math.prod(mesh.shape[axis] for axis in split) == 0


EXCHANGES: dict[str, Backend] = {
    "gather": gather(),
    "all_to_all": all_to_all(),
    "ragged_all_to_all": ragged_all_to_all(),
}
NAMES = (*grouped.BACKENDS, *EXCHANGES)


@cache
def by_name(name: str) -> Backend:
    """The backend called `name` for experts on any number of devices.

    A name of `EXCHANGES` says how tokens travel. A name of `grouped.BACKENDS` says how experts are
    applied where they are: tokens then travel by `gather`, which never drops a choice (`auto`
    keeps its promise on any mesh), and for `capacity`, whose slots have fixed sizes, by
    all_to_all. Raises UserError with the nearest names.
    """
    if name in EXCHANGES:
        return EXCHANGES[name]
    if name not in grouped.BACKENDS:
        raise unknown("dispatch backend", name, list(NAMES))
    local = grouped.BACKENDS[name]
    if name == "auto":
        return _over_experts("gather", gathered(grouped.fastest), local)
    if name == "capacity":
        return with_capacity(lambda stacked: capacity(stacked=stacked))
    return gather(local)
