"""Which devices hold which experts: V-MoE's rule, for meshes that are made by hand.

`mesh.make_mesh` leaves the neighbourhood of devices to JAX. V-MoE's code base instead puts the
parts of the experts along one direction of the hardware before the next (its authors measured which
ones are fast): on chips without a third direction (TPU v2, v3) x, then y, then the cores of a chip;
otherwise z, y, x, cores; elsewhere (CPU, GPU) the devices of one process before other processes.
The same order as an `arrange` of `make_mesh`, so that it can be tried and measured:

    make_mesh(MeshConfig(expert=8), arrange=expert_grid.arrange)

The copies of a part (here `data` and `fsdp`) take what is left. Processes whose devices do not lie
together in the result are left as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from moezoo.errors import UserError


def hardware(devices: Sequence[Any]) -> np.ndarray:
    """The devices at their places: axes (core, x, y, z) on TPUs, (device of a process, process)
    elsewhere. Raises UserError where they fill no box.
    """
    on_tpu = hasattr(devices[0], "coords")
    first: dict[int, int] = {}
    for device in devices:
        index = device.process_index
        first[index] = min(first.get(index, device.id), device.id)
    places = {
        (device.core_on_chip, *device.coords)
        if on_tpu
        else (device.id - first[device.process_index], device.process_index): device
        for device in devices
    }
    lowest, highest = np.min(list(places), axis=0), np.max(list(places), axis=0)
    shape = tuple(int(n) for n in highest - lowest + 1)
    if math.prod(shape) != len(devices):
        raise UserError(f"{len(devices)} devices fill no box of {shape}: use the default mesh.")
    grid = np.empty(shape, object)
    for place, device in places.items():
        grid[tuple(np.asarray(place) - lowest)] = device
    return grid


def order(shape: Sequence[int]) -> tuple[int, ...]:
    """The axes of the hardware in the order in which experts are laid along them."""
    if len(shape) == 2:
        return (0, 1)
    return (1, 2, 0) if shape[3] == 1 else (3, 2, 1, 0)


def by_expert(grid: np.ndarray, parts: int) -> np.ndarray:
    """Devices [parts, copies]: row p holds part p of the experts.

    Raises UserError where `parts` is no product of divisors of the hardware's sides.
    """
    split, left = [1] * grid.ndim, parts
    for axis in order(grid.shape):
        split[axis] = min(left, grid.shape[axis])
        left //= split[axis]
    whole = all(side % part == 0 for side, part in zip(grid.shape, split, strict=True))
    if math.prod(split) != parts or not whole:
        raise UserError(
            f"mesh.expert={parts} does not fit devices that lie as {grid.shape}: take a product "
            "of divisors of these sides."
        )
    turned = grid.transpose()
    sides = [(part, side // part) for part, side in zip(split, grid.shape, strict=True)]
    pairs = [n for pair in reversed(sides) for n in pair]
    axes = [*range(0, 2 * grid.ndim, 2), *range(1, 2 * grid.ndim, 2)]
    return turned.reshape(pairs).transpose(axes).reshape(parts, -1)


def arrange(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as (data, fsdp, expert, tensor), the experts' axis by V-MoE's rule.

    Raises UserError where the rule has no place for them, or with a tensor axis.
    """
    data, fsdp, expert, tensor = shape
    if tensor > 1:
        raise UserError(f"mesh.tensor is {tensor}; V-MoE's rule for devices knows no such axis.")
    return by_expert(hardware(devices), expert).T.reshape(data, fsdp, expert, tensor)
