"""Accelerators by name, with their makers' published numbers for one chip.

Dense bfloat16 operations without sparsity, and memory. TPUs: the pages of cloud.google.com/tpu/docs
on v4, v5e, v5p and v6e. GPUs: NVIDIA's data sheets of A100, H100 and H200 (SXM).
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip.

    flops: operations per second, bfloat16, two per multiply-add.   memory: bytes; None where a chip
    of this name comes with several sizes.
    """

    name: str
    flops: float
    memory: float | None


# By the start of a topology's name, as `moezoo plan --topology` has it.
TPUS = {
    "v4": Chip("TPU v4", 275e12, 32e9),
    "v5e": Chip("TPU v5e", 197e12, 16e9),
    "v5litepod": Chip("TPU v5e", 197e12, 16e9),
    "v5p": Chip("TPU v5p", 459e12, 95e9),
    "v6e": Chip("TPU v6e", 918e12, 32e9),
}
GPUS = (
    Chip("A100", 312e12, None),
    Chip("H100", 989e12, None),
    Chip("H200", 989e12, None),
)
# What JAX calls TPUs (`device_kind`), where a topology has another word.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def of_topology(topology: str) -> Chip | None:
    """The chip of a topology such as "v5p:2x2x4"; None where it is not known here."""
    return TPUS.get(topology.partition(":")[0])


def of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls so (`Device.device_kind`); None where it is not known here."""
    if kind in KINDS:
        return TPUS[KINDS[kind]]
    return next((chip for chip in GPUS if chip.name in kind), None)
