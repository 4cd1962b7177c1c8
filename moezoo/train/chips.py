"""Accelerators by name, with their makers' published numbers for one chip.

Dense bfloat16 operations without sparsity, memory and its rate, and what a chip sends to its
neighbours. TPUs: the pages of cloud.google.com/tpu/docs on v4, v5e, v5p, v6e and TPU7x. GPUs:
NVIDIA's data sheets of A100, H100 and H200 (SXM).
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One chip.

    flops: operations per second, bfloat16, two per multiply-add.   memory: bytes.   memory_rate,
    link_rate: bytes per second from its memory, and over all its links in one direction.
    """

    name: str
    flops: float
    memory: float
    memory_rate: float
    link_rate: float


# By the start of a topology's name, as `moezoo plan --topology` has it.
TPUS = {
    "v4": Chip("TPU v4", 275e12, 32e9, 1.2e12, 300e9),
    "v5e": Chip("TPU v5e", 197e12, 16e9, 0.82e12, 200e9),
    "v5litepod": Chip("TPU v5e", 197e12, 16e9, 0.82e12, 200e9),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2.77e12, 600e9),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1.64e12, 448e9),
    "tpu7x": Chip("TPU7x", 2307e12, 192e9, 7.4e12, 1200e9),
}
GPUS = (
    Chip("A100", 312e12, 80e9, 2.0e12, 300e9),
    Chip("H100", 989e12, 80e9, 3.35e12, 450e9),
    Chip("H200", 989e12, 141e9, 4.8e12, 450e9),
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
    "TPU7x": "tpu7x",
}


def of_topology(topology: str) -> Chip | None:
    """The chip of a topology such as "v5p:2x2x4"; None where it is not known here."""
    return TPUS.get(topology.partition(":")[0])


def of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls so (`Device.device_kind`); None where it is not known here."""
    if kind in KINDS:
        return TPUS[KINDS[kind]]
    return next((chip for chip in GPUS if chip.name in kind), None)
