"""Rows of a file kept in pinned host memory, from where a device fetches them without the host.

Memory that the system never moves is what an accelerator copies from by itself, while it computes.
All experts that were asked for stay there, so the host has to have room for them; the device still
holds two at a time (`deploy.stream`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import Array
from jax.sharding import SingleDeviceSharding

from moezoo.errors import unknown
from moezoo.weights.rows import RowFile

ExpertPlace = Literal["file", "pinned_host"]
PLACES: tuple[str, ...] = get_args(ExpertPlace)
PINNED = PLACES[1]


def pinned_memory(device: Any) -> SingleDeviceSharding | None:
    """The pinned memory of a device's host; None where the platform has none."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    return SingleDeviceSharding(device, memory_kind=PINNED) if PINNED in kinds else None


def rows_in(place: ExpertPlace, file: RowFile, device: Any) -> PinnedRows | None:
    """What keeps a file's rows in this place; None where they come from the file every time.

    That is also where the platform has no pinned memory. Raises UserError for another place.
    """
    if place not in PLACES:
        raise unknown("place of experts", str(place), list(PLACES))
    memory = pinned_memory(device) if place == PINNED else None
    return None if memory is None else PinnedRows(file, memory)


class PinnedRows:
    """Rows of a file's arrays, each read once.

    memory: where they stay (`pinned_memory`).
    """

    def __init__(self, file: RowFile, memory: SingleDeviceSharding):
        self._file, self._memory = file, memory
        self._held: dict[tuple[str, int], Array] = {}
        (device,) = memory.device_set
        self._device = SingleDeviceSharding(device)

    def on_device(self, names: Sequence[str], row: int) -> list[Array]:
        """One row of each of these arrays on the device, copies that the caller may delete.

        The copying goes on while the host does something else. Raises UserError as `RowFile.read`.
        """
        held = [self._row(name, row) for name in names]
        return jax.device_put(held, self._device, may_alias=False)

    def _row(self, name: str, row: int) -> Array:
        if (name, row) not in self._held:
            form = self._file.form(name)
            # Memory of its own for each: where the host's memory is the device's, it is taken as
            # it is, and another row must not be read into it.
            read = np.empty(form.shape, form.dtype)
            self._file.read(name, row, read)
            self._held[name, row] = jax.device_put(read, self._memory)
        return self._held[name, row]
