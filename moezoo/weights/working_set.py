"""Thousands of adapters of a library at work in bounded memory: slots on the device, and files.

Of all members that a library registers, `resident` lie in the slots of a bank on the device and
`kept` more in host memory; the others are read from their files when a row asks for them. The
longest unused one makes room. So memory is at most

    (resident + 1 + kept) * Library.bytes_of_member()

beside the base and the manifest, however many members there are. The bank is changed in place: the
program that serves it is compiled once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted
from moezoo.nn.served import ServedUpdate
from moezoo.weights.library import Library

Pair = tuple[np.ndarray, np.ndarray]


class WorkingSet:
    """The members of a library that are at work on a decoder.

    root: the bare decoder, which gets a bank on every layer of the library, in place. Raises
    UserError where there is no slot.
    """

    def __init__(self, root: nnx.Module, library: Library, resident: int, kept: int = 0):
        if resident < 1 or kept < 0:
            raise UserError(
                f"{resident} resident adapters and {kept} kept ones: at least one must be resident."
            )
        self.library, self.resident, self.kept = library, resident, kept
        for path, form in library.layers.items():
            sizes = (form.inputs, form.outputs, form.rank, resident + 1)  # slot 0 is the bare base
            update: Any = ServedUpdate(*sizes, scale=form.scale)
            surgery.replace(root, path, Adapted(surgery.get(root, path), update))
        parts = module.split(root)
        stats = module.flatten(parts.stats)
        self._names = {
            path: tuple(f"{path}/update/{side}" for side in ("down", "up"))
            for path in library.layers
        }
        self._bank = {path: tuple(stats[n] for n in pair) for path, pair in self._names.items()}
        self._parts = parts
        self._slots: OrderedDict[str, int] = OrderedDict()  # the longest unused one first
        self._host: OrderedDict[str, dict[str, Pair]] = OrderedDict()
        self.read = 0  # members that came from files so far

    @property
    def parts(self) -> module.ModuleParts:
        """The decoder's parts with the bank as it is now; rows' slots go into `Context.task_B`."""
        stats = module.flatten(self._parts.stats)
        for path, pair in self._names.items():
            stats |= dict(zip(pair, self._bank[path], strict=True))
        return self._parts._replace(stats=module.unflatten(stats))

    @property
    def members(self) -> tuple[str, ...]:
        """Those in slots, the longest unused one first."""
        return tuple(self._slots)

    @property
    def most_bytes(self) -> int:
        """What all adapters in memory take at most."""
        return (self.resident + 1 + self.kept) * self.library.bytes_of_member()

    def slots(self, names: Sequence[str | None]) -> jax.Array:
        """The slot of each row's adapter, int32 [B], after loading what is missing; None: the base.

        Raises UserError for more different adapters in a batch than are resident, and for one that
        the library has not; nothing is loaded then.
        """
        wanted = dict.fromkeys(name for name in names if name is not None)
        if len(wanted) > self.resident:
            raise UserError(
                f"The batch asks for {len(wanted)} different adapters, but {self.resident} can be "
                "resident: make smaller batches, or more slots."
            )
        for name in wanted:
            if name not in self.library.members:
                self.library.factors(name)  # which says so
        for name in wanted:
            if name in self._slots:
                self._slots.move_to_end(name)
        for name in wanted:
            if name not in self._slots:
                self._load(name)
        return jnp.asarray([0 if n is None else self._slots[n] for n in names], jnp.int32)

    def _load(self, name: str) -> None:
        held = self._from_host(name)  # first: what cannot be read evicts nobody
        if len(self._slots) == self.resident:
            _, slot = self._slots.popitem(last=False)
        else:
            slot = len(self._slots) + 1
        self._bank = _placed(self._bank, held, slot)
        self._slots[name] = slot

    def _from_host(self, name: str) -> dict[str, Pair]:
        if name in self._host:
            self._host.move_to_end(name)
            return self._host[name]
        held = {path: (f.down, f.up) for path, f in self.library.factors(name).items()}
        self.read += 1
        if self.kept:
            self._host[name] = held
            if len(self._host) > self.kept:
                self._host.popitem(last=False)
        return held


@partial(jax.jit, donate_argnums=0)
def _placed(bank: Any, held: Any, slot: Any) -> Any:
    """The bank with one member in a slot, in the memory of the one before."""
    return jax.tree.map(lambda a, one: a.at[slot].set(one.astype(a.dtype)), bank, held)
