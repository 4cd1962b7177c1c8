"""The one mesh of a run, and the batch on it."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moezoo.errors import UserError

AXES = ("data", "fsdp", "expert", "tensor")
Arrange = Callable[[list[Any], tuple[int, ...]], np.ndarray]  # devices of one slice, its shape
BATCH = PartitionSpec(("data", "fsdp", "expert"))  # devices along tensor see the same rows


class MeshSizes(Protocol):
    """The sizes that `make_mesh` reads (`schema.MeshConfig`); -1 stands for the rest."""

    @property
    def data(self) -> int: ...
    @property
    def fsdp(self) -> int: ...
    @property
    def expert(self) -> int: ...
    @property
    def tensor(self) -> int: ...
    @property
    def slices(self) -> int: ...
    @property
    def fsdp_slices(self) -> int: ...
    @property
    def expert_slices(self) -> int: ...
    @property
    def tensor_slices(self) -> int: ...


def resolve(sizes: MeshSizes, count: int) -> tuple[int, int, int, int]:
    """The sizes of (data, fsdp, expert, tensor) on `count` devices, -1 replaced by the rest.

    Raises UserError where they are not whole, do not multiply to `count`, or do not split into
    the given number of slices.
    """
    wanted = {axis: getattr(sizes, axis) for axis in AXES}
    text = ", ".join(f"mesh.{axis}={size}" for axis, size in wanted.items())
    for axis, size in wanted.items():
        if size < 1 and size != -1:
            raise UserError(f"mesh.{axis} is {size}; it must be at least 1, or -1 for the rest.")
    free = [axis for axis, size in wanted.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"{text}: only one axis may be -1.")
    known = math.prod(size for size in wanted.values() if size != -1)
    if free and count % known == 0:
        wanted[free[0]] = count // known
    elif free or known != count:
        needs = f"a multiple of {known}" if free else f"exactly {known}"
        raise UserError(f"{text} needs {needs} devices, but there are {count}.")
    _check_outer(sizes, wanted)
    data, fsdp, expert, tensor = wanted.values()
    return data, fsdp, expert, tensor


def outer(sizes: MeshSizes) -> tuple[int, int, int, int]:
    """How many slices each axis goes over, between which the slower network lies.

    What is left of `slices` is the data axis's. UserError where the others do not divide them.
    """
    taken = sizes.fsdp_slices, sizes.expert_slices, sizes.tensor_slices
    product = math.prod(taken)
    if sizes.slices < 1 or min(taken) < 1 or sizes.slices % product:
        named = zip(AXES[1:], taken, strict=True)
        said = ", ".join(f"mesh.{axis}_slices={n}" for axis, n in named if n != 1)
        of = f"a multiple of {product} for {said}" if said else "at least 1"
        raise UserError(f"mesh.slices is {sizes.slices}; it must be {of}.")
    return (sizes.slices // math.prod(taken), *taken)


def _check_outer(sizes: MeshSizes, wanted: Mapping[str, int]) -> None:
    for axis, parts in zip(AXES, outer(sizes), strict=True):
        if wanted[axis] % parts:
            name = "slices" if axis == "data" else f"{axis}_slices"
            why = ": whole slices split the batch" if axis == "data" else ""
            raise UserError(
                f"mesh.{name} is {parts}, which does not divide the {axis} axis "
                f"of {wanted[axis]}{why}."
            )


def _arranged(devices: list[Any], shape: tuple[int, ...]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (ValueError, NotImplementedError, AssertionError) as error:
        sizes = ", ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True))
        raise UserError(
            f"The mesh ({sizes} in a slice) cannot be laid on {len(devices)} devices "
            f"({devices[0].device_kind}): {' '.join(str(error).split())[:200]}; take sizes that "
            "are products of the sides of the topology."
        ) from error


def make_mesh(
    sizes: MeshSizes, devices: Sequence[Any] | None = None, arrange: Arrange = _arranged
) -> Mesh:
    """The mesh with axes (data, fsdp, expert, tensor), Auto types, over all devices.

    Within a slice the neighbourhood of devices follows the hardware, as `arrange` says. Each
    axis is an outer part over slices (`outer`) times an inner one; by default slices split the data
    axis, so that only gradients cross the slower network.
    """
    devices = list(jax.devices() if devices is None else devices)
    whole, over = resolve(sizes, len(devices)), outer(sizes)
    shape = tuple(size // parts for size, parts in zip(whole, over, strict=True))
    parts = np.stack([arrange(part, shape) for part in _slices(devices, sizes.slices)])
    # [slices of each axis, its devices in a slice] side by side, the outer part first.
    pairs = [place for axis in range(len(AXES)) for place in (axis, len(AXES) + axis)]
    laid = parts.reshape(*over, *shape).transpose(pairs).reshape(whole)
    # Auto: with Explicit axes `ragged_dot` and sharded sums need an `out_sharding` each.
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: list[Any], count: int) -> list[list[Any]]:
    """The devices of each slice; machines without slices are cut in order."""
    indices = [getattr(device, "slice_index", None) for device in devices]
    found = sorted({index for index in indices if index is not None})
    if len(found) < 2:
        size = len(devices) // count
        return [devices[i * size : (i + 1) * size] for i in range(count)]
    if len(found) != count:
        raise UserError(f"mesh.slices is {count}, but the devices lie in {len(found)} pod slices.")
    return [[d for d, i in zip(devices, indices, strict=True) if i == index] for index in found]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis over (data, fsdp, expert), everything else whole."""
    return NamedSharding(mesh, BATCH)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split; a global batch must be a multiple of it."""
    return math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))


def rows(mesh: Mesh, batch: int) -> tuple[int, ...]:
    """The rows of the global batch that this process has to read, in ascending order.

    With gaps where the mesh lays other processes' devices between its own, as most shapes of a pod
    do. Rows that also lie on another process's devices (a tensor axis that spans processes) are
    read by both.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch,))
    spans = {index[0].indices(batch)[:2] for index in indices.values() if index is not None}
    return tuple(sorted({row for span in spans for row in range(*span)}))


def place(mesh: Mesh, local: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """Global arrays [batch, ...] from this process's `rows` of each, on their devices.

    The arrays may be nested.
    """
    sharding, own = batch_sharding(mesh), rows(mesh, batch)

    def one(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            # A device's rows stand one after the other, also among `own`, which has all of them.
            start, stop, _ = index[0].indices(batch)
            at = bisect_left(own, start)
            return array[(slice(at, at + stop - start), *index[1:])]

        return jax.make_array_from_callback((batch, *array.shape[1:]), sharding, part)

    return jax.tree.map(one, dict(local))
