"""Whether a state fits into the memory of this machine, before anything of it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from moezoo.errors import UserError



def check(state: Tree, shardings: Tree) -> None:
    """UserError where a state and its gradients are larger than the memory they would lie in.

    Activations come on top, so what is refused could not be trained; what passes may still be too
    large.

    Args:
      state: shapes and dtypes, {"params": ..., ...}.
      shardings: one per leaf, of the same structure.
    """
    need = _bytes(state, shardings) + _bytes(state["params"], shardings["params"])
    devices = _devices(shardings)
    have = available(devices)
    if have is not None and need > have:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"]))
        raise UserError(
            f"The model has {count:,} parameters: with their gradients and the optimiser's state "
            f"they take {need / 1e9:,.1f} GB of each device, which has {have / 1e9:,.1f} GB: take "
            "a smaller model, or split it over more devices with --mesh.fsdp."
        )


def available(devices: Sequence[Any]) -> float | None:
    """Bytes of memory for each of this process's devices; None where the system does not tell.

    Devices of a CPU share that of the machine.
    """
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if devices[0].platform != "cpu":
        return None
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return whole / len(devices)


def _bytes(tree: Tree, shardings: Tree) -> int:
    """What one device holds of a tree."""

    def of(leaf: Any, sharding: jax.sharding.Sharding) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(of, tree, shardings)))


def _devices(shardings: Tree) -> list[Any]:
    first: jax.sharding.Sharding = jax.tree.leaves(shardings)[0]
    return sorted(first.addressable_devices, key=lambda device: device.id)
