"""Experts on several devices: split over the mesh axis `expert`, or copied to every device.

Tokens are split over all of `data`, `fsdp` and `expert`. With an `expert` axis of more than one
device each device holds E / P of the experts, and tokens travel to them and back in one of three
ways:

- `gather` brings all tokens of an expert group to each of its devices: exact, and what the names
  of dropless backends stand for;
- `all_to_all` sends buffers of fixed size: the least traffic that every platform can do; a load
  that is too uneven drops choices (counted);
- `ragged_all_to_all` sends only rows that exist, into a bounded buffer (TPU and GPU).

`auto` is exact as well: where fixed buffers move fewer bytes than a gather it exchanges by them,
and gathers in the steps whose load does not fit.

Without such an axis all three are the plain backend on each device's own tokens. Where tokens
cannot be split evenly, and inside another `shard_map`, the plain backend runs as it stands, and the
compiler partitions it in its own way, gathering experts where it must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from moezoo.errors import UserError, unknown
from moezoo.ops import grouped
from moezoo.ops.capacity import HERE, Priority, Stacked, by_position, capacity, capacity_slots
from moezoo.ops.dispatch import Slots, at, combine, sort_by_expert, sorted_slots, spread
from moezoo.ops.expert import Applied, Backend, ExpertFn, Params, count_experts, platform
from moezoo.ops.expert_parallel import (
    EXPERT,
    Choices,
    arrivals,
    as_routing,
    at_most,
    check_room,
    choices_of_slots,
    count,
    listed,
    own_choices,
    room,
    share_of_tokens,
)
from moezoo.ops.routing import Routing


def exchanged(local: Backend, factor: float, slots: int | None, priority: Priority) -> Backend:
    """Inside a `shard_map`: tokens to the devices of their experts and sums back, by all_to_all.

    A token is sent once to each device that it visits. `slots` tokens go from one device to
    another, or `factor` times an even share; a token that finds no slot there loses its choices
    on that device. First choices take slots before second ones, tokens in order of `priority`.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        size, devices = count_experts(params), lax.axis_size(EXPERT)
        limit = room(n, k, size * devices, devices, factor, slots)
        visit = routing._replace(experts_NK=arrivals(routing.experts_NK, size))
        plan = capacity_slots(visit, devices, limit.tokens, priority)
        device_S = jnp.repeat(jnp.arange(devices, dtype=jnp.int32), limit.tokens)
        with_token = choices_of_slots(routing, plan, device_S, size)
        swap = partial(lax.all_to_all, axis_name=EXPERT, split_axis=0, concat_axis=0, tiled=True)
        arrived = as_routing(Choices(*map(swap, with_token)), size)
        here = at_most(local, limit.choices)
        y_SD, dropped = here(fn, params, swap(spread(x_ND, plan)), arrived)
        # Weight 1: the sums that come back are weighted already.
        y_ND = combine(swap(y_SD), jnp.ones((n, k), jnp.float32), plan)
        lost = count(routing.experts_NK) - count(with_token.experts_NK)
        return Applied(y_ND.astype(x_ND.dtype), dropped + lost)

    return apply


def _count(params: Params) -> int:
    return count_experts(params) * lax.axis_size(EXPERT)


def _apply(fn: ExpertFn, params: Params, x_ECD: Array) -> Array:
    swap = partial(lax.all_to_all, axis_name=EXPERT, tiled=True)
    x_ECD = swap(x_ECD, split_axis=0, concat_axis=1)  # own experts, slots of all devices
    y_ECD = HERE.apply(fn, params, x_ECD)
    return swap(y_ECD, split_axis=1, concat_axis=0)


# The experts of a whole expert axis: slots go to the devices of their experts and back.
ACROSS = Stacked(_count, _apply)


def gathered(local: Backend) -> Backend:
    """Inside a `shard_map`: all_gather the tokens, apply the own experts, psum_scatter the sums.

    Exact whatever the load. Moves and holds the tokens of all P devices of the expert axis, which
    is P / min(K, P) times what has to travel or more: for short axes.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        size = count_experts(params)
        x_MD = lax.all_gather(x_ND, EXPERT, tiled=True)
        own = own_choices(routing, size)
        y_MD, dropped = local(fn, params, x_MD, as_routing(own, size))
        return Applied(lax.psum_scatter(y_MD, EXPERT, tiled=True), dropped)

    return apply


def least_sent(local: Backend, received: Backend, factor: float, priority: Priority) -> Backend:
    """Inside a `shard_map`: `exchanged` in every step whose load has room, else `gathered`; exact.

    The devices of a group agree on it beforehand, from the numbers of visits and of choices. Where
    buffers would be as large as all tokens, nothing is saved and this is `gathered`. `received`
    applies experts to what `exchanged` brings, `local` to what is gathered.
    """
    send, gather_all = exchanged(received, factor, None, priority), gathered(local)

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        size, devices = count_experts(params), lax.axis_size(EXPERT)
        limit = room(n, k, size * devices, devices, factor, None)
        if limit.tokens >= n:
            return gather_all(fn, params, x_ND, routing)
        visits_P = _to_devices(arrivals(routing.experts_NK, size), devices)
        home_NK = jnp.where(routing.experts_NK < 0, -1, routing.experts_NK // size)
        choices_P = lax.psum(_to_devices(home_NK, devices), EXPERT)
        most = lax.pmax(jnp.max(visits_P), EXPERT)
        fits = (most <= limit.tokens) & (jnp.max(choices_P) <= limit.choices)

        def rarely(params: Params, x_ND: Array, routing: Routing) -> Applied:
            return gather_all(fn, params, x_ND, routing)

        return lax.cond(
            fits,
            lambda *args: send(fn, *args),
            # What it would keep for its gradient takes room in every step: it computes that again.
            jax.checkpoint(jax.jit(rarely)),  # by this name `ops.flops` knows it
            params,
            x_ND,
            routing,
        )

    return apply


def _to_devices(device_NK: Array, devices: int) -> Array:
    """How many entries name each device, int32 [P]; -1 names none."""
    return jnp.sum(device_NK[..., None] == jnp.arange(devices), axis=(0, 1), dtype=jnp.int32)


class Trip(NamedTuple):
    """What one device sends to and gets from each of the P devices, int32 [P] each.

    from_P: first row of what goes to each; send_P: how many rows; to_P: where they begin at the
    receiver; receive_P: how many rows come from each.
    """

    from_P: Array
    send_P: Array
    to_P: Array
    receive_P: Array


class Journey(NamedTuple):
    """A trip and the trip back."""

    there: Trip
    back: Trip


def plan_journey(sizes_P: Array, rows: int) -> Journey:
    """This device wants to send `sizes_P` rows to each; every device has room for `rows`.

    Devices fill a receiver's room in order; what does not fit any more stays at home.
    """
    me = lax.axis_index(EXPERT)
    # Everybody learns all sizes: who is cut short depends on what others send to the same device.
    wanted_PP = lax.all_gather(sizes_P, EXPERT)  # [sender, receiver]
    from_PP = jnp.cumsum(wanted_PP, axis=1) - wanted_PP
    to_PP = jnp.minimum(jnp.cumsum(wanted_PP, axis=0) - wanted_PP, rows)
    # A trip that begins at the end of the room has no rows.
    sent_PP = jnp.minimum(wanted_PP, rows - to_PP)
    there = Trip(from_PP[me], sent_PP[me], to_PP[me], sent_PP[:, me])
    return Journey(there, Trip(to_PP[:, me], sent_PP[:, me], from_PP[:, me], sent_PP[me]))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def travel(rows: int, x_SD: Array, journey: Journey) -> Array:
    """The rows that arrive, [rows, D]; rows that nobody sends are 0."""
    room = jnp.zeros((rows, *x_SD.shape[1:]), x_SD.dtype)
    return lax.ragged_all_to_all(x_SD, room, *journey.there, axis_name=EXPERT)


def _travel_forward(rows: int, x_SD: Array, journey: Journey):
    return travel(rows, x_SD, journey), (x_SD, journey)


def _travel_backward(rows: int, saved, dy: Array):
    x_SD, journey = saved
    return travel(x_SD.shape[0], dy, Journey(journey.back, journey.there)), None


travel.defvjp(_travel_forward, _travel_backward)


def ragged_exchanged(local: Backend, factor: float, rows: int | None) -> Backend:
    """Inside a `shard_map`: tokens to the devices of their experts and sums back, as they are.

    A token is sent once to each device that it visits. A device takes `rows` visits, or `factor`
    times an even share; what comes beyond that is dropped, from the last devices first, and
    counted. With rows = P * N nothing can be dropped.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        n, k = routing.experts_NK.shape
        size, devices = count_experts(params), lax.axis_size(EXPERT)
        limit = _limit(n, k, size, devices, factor, rows)
        leaving = sort_by_expert(arrivals(routing.experts_NK, size), devices)
        # A token visits at most min(K, P) devices.
        plan = _cut(sorted_slots(leaving, k), n * min(k, devices))
        journey = plan_journey(leaving.end_E - leaving.start_E, limit.arrivals)
        wanted = own_choices(routing, size)
        arrived = _arrived(wanted, limit.arrivals)
        x_RD: Array = travel(limit.arrivals, spread(x_ND, plan), journey)  # type: ignore[assignment]
        here = at_most(local, limit.choices)
        y_RD, dropped = here(fn, params, x_RD, as_routing(arrived, size))
        y_SD: Array = travel(  # type: ignore[assignment]
            plan.choice_S.shape[0], y_RD, Journey(journey.back, journey.there)
        )
        # Rows that found no room come back as 0, which is what they contribute.
        y_ND = combine(y_SD, jnp.ones((n, k), jnp.float32), plan)
        lost = count(wanted.experts_NK) - count(arrived.experts_NK)
        return Applied(y_ND.astype(x_ND.dtype), dropped + lost)

    return apply


def _arrived(wanted: Choices, rows: int) -> Choices:
    """The choices of each row that arrives: visitors in order of their device, then of token.

    Every device knows all choices of its group, which are few bytes next to the tokens: rows of a
    few numbers would be padded to a TPU's 128 lanes on their way.
    """
    plan = listed(jnp.where(jnp.any(wanted.experts_NK >= 0, axis=1), 0, -1)[:, None], rows)
    token_S = jnp.maximum(plan.choice_S, 0)
    experts_SK = jnp.where((plan.choice_S >= 0)[:, None], at(wanted.experts_NK, token_S), -1)
    return Choices(experts_SK, spread(wanted.weights_NK, plan))


class _Limit(NamedTuple):
    arrivals: int
    choices: int


def _limit(n: int, k: int, size: int, devices: int, factor: float, rows: int | None) -> _Limit:
    most = devices * n
    if rows is not None:
        return _Limit(min(rows, most), min(rows, most) * min(k, size))
    share = devices * n * share_of_tokens(k, size * devices, devices)
    taken = min(most, math.ceil(factor * share))
    return _Limit(taken, min(taken * min(k, size), math.ceil(factor * n * k)))


def _cut(plan: Slots, rows: int) -> Slots:
    """Without the rows at the end that are never filled."""
    return plan._replace(choice_S=plan.choice_S[:rows])


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
    """Experts split over the axis `expert`, tokens gathered to them; exact (`ops.exchange`).

    `local` applies the experts of one device and sees many tokens that have none of them.
    """
    return _over_experts("gather", gathered(local), local)


ROOM = 1.15  # of `all_to_all`, over what an even load needs
SPARE = 1.5  # of `auto`, whose buffers should seldom be too small


def all_to_all(
    factor: float = ROOM,
    *,
    slots: int | None = None,
    local: Backend = grouped.auto,
    priority: Priority = by_position,
) -> Backend:
    """Experts split over the axis `expert`, buffers of fixed size (`ops.exchange.exchanged`).

    `factor` times what an even load needs, or exactly `slots` tokens from one device to another;
    choices that do not fit are dropped and counted. `local` applies the experts of one device.
    """
    check_room(factor, slots)
    return _over_experts("all_to_all", exchanged(local, factor, slots, priority), local)


def ragged_all_to_all(
    factor: float = 2.0, *, rows: int | None = None, local: Backend = grouped.auto
) -> Backend:
    """Experts split over the axis `expert`, rows sent as they are (`ops.exchange`).

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


CheckText = Callable[[str], None]


def _over_experts(
    name: str, sharded: Backend, local: Backend, check: CheckText = lambda name: None
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
    on_each_device = jax.shard_map(
        body,
        in_specs=(specs, rows, rows),
        out_specs=(rows, EVERYWHERE),
        # Other axes, such as tensor, stay with the compiler.
        axis_names=set(split),
        # Loops of the backends begin with zeros that are the same on all devices and end with sums
        # that are not: the check refuses such carries.
        check_vma=False,
    )
    return Applied(*on_each_device(params, x_ND, routing))


def _own_experts(stack: Array) -> PartitionSpec:
    """Experts [E, ...] over `expert`, and matrices over `fsdp` where the mesh has that axis."""
    parts = jax.sharding.get_abstract_mesh().shape.get("fsdp", 1)
    # Biases [E, F] are not split over fsdp, as in the table of `train.placement`.
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
# Those whose buffers or slots have fixed sizes, so that choices may find no room.
DROPPING = ("capacity", "all_to_all", "ragged_all_to_all")


# Cached: a backend is part of a module's definition, and equal names must give equal ones.
@cache
def by_name(name: str) -> Backend:
    """The backend called `name` for experts on any number of devices.

    A name of `EXCHANGES` says how tokens travel. A name of `grouped.BACKENDS` says how experts are
    applied where they are: tokens then travel by `gather`, which never drops a choice; for `auto`
    by all_to_all where that moves fewer bytes and drops nothing (`least_sent`); and for `capacity`,
    whose slots have fixed sizes, by all_to_all. Raises UserError with the nearest names.
    """
    if name in EXCHANGES:
        return EXCHANGES[name]
    if name not in grouped.BACKENDS:
        raise unknown("dispatch backend", name, list(NAMES))
    local = grouped.BACKENDS[name]
    # A device that holds one of several experts must not take the way of a single expert, which
    # has every token.
    if name == "auto":
        sharded = least_sent(grouped.fastest, local, SPARE, by_position)
        return _over_experts("auto", sharded, local)
    if name == "capacity":
        return with_capacity(lambda stacked: capacity(stacked=stacked))
    return gather(local)
