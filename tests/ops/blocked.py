"""For tests of kernels: rows in blocks of experts, tiles, and cards that need not be here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from moezoo.ops import mosaic_products
from moezoo.ops.grouped_matmul import Groups, Tables
from moezoo.ops.triton_products import TritonTable, TritonTiles

_SMALL = (TritonTiles(16, 16, 16, 1, 1),) * 2  # several tiles where blocks are small
TRITON = Tables(None, TritonTable(_SMALL, _SMALL, _SMALL, _SMALL))
# The kernels for Hopper where they fit, whatever this machine is.
MOSAIC = TRITON._replace(mosaic=mosaic_products.TABLE)
interpreted = pytest.mark.skipif(
    not hasattr(mosaic_gpu, mosaic_products.INTERPRETER[0]),
    reason="Mosaic GPU's interpreter needs JAX 0.11",
)


class Blocked:
    """Groups of given sizes in `blocks` blocks, some of them not in use; NumPy."""

    def __init__(self, sizes: list[int], block: int, blocks: int):
        count = np.maximum(-(-np.asarray(sizes) // block), 1)
        last = np.cumsum(count)
        first = last - count
        owner = np.repeat(np.arange(len(sizes)), count)
        owner = np.append(owner, np.full(blocks - len(owner), len(sizes) - 1))
        self.groups = Groups(*(jnp.asarray(a, jnp.int32) for a in (owner, first, last)))
        self.rows = len(owner) * block
        self.expert = np.full(self.rows, -1)  # of each row; -1: empty
        for e, size in enumerate(sizes):
            self.expert[first[e] * block : first[e] * block + size] = e
        self.used = int(last[-1]) * block

    def of(self, rng: np.random.Generator, width: int) -> np.ndarray:
        """Random rows, 0 where they are empty, NaN in blocks that are not in use."""
        rows = rng.normal(size=(self.rows, width)) * (self.expert >= 0)[:, None]
        rows[self.used :] = np.nan
        return rows


def card(kind: str) -> Any:
    """A mesh of one GPU that this machine need not have."""
    device = AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


CALLS = ("mosaic_gpu_v2", "__gpu$xla.gpu.triton")  # what programs call, by Mosaic GPU and Triton
CARDS = dict(zip(CALLS, ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"), strict=True))
