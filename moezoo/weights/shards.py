"""An array from a file to its devices, part by part: the host never holds it whole."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Sharding

AHEAD = 4  # parts on the host at the same time


def from_parts(
    shape: tuple[int, ...], sharding: Sharding, read: Callable[[tuple[slice, ...] | None], Any]
) -> Array:
    """The array of `shape` whose part at an index is `read(index)`, a NumPy array, at its place.

    Each part that this process's devices hold is read once, some at a time in threads, and leaves
    the host before the next ones come. It is all there when this returns.
    """
    devices: dict[str, list[Any]] = {}
    indices: dict[str, tuple[slice, ...] | None] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(str(index), []).append(device)
        indices[str(index)] = index

    def bring(name: str) -> list[Array]:
        part = np.asarray(read(indices[name]))
        # Waited for: what is only on its way to a device is still on the host.
        return [jax.device_put(part, device).block_until_ready() for device in devices[name]]

    with ThreadPoolExecutor(min(AHEAD, len(devices))) as pool:
        placed = [array for arrays in pool.map(bring, devices) for array in arrays]
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)
