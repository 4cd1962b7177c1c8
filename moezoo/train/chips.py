"""Accelerators by name, with their makers' published numbers for one chip.

Dense bfloat16 operations without sparsity, memory, and bytes per second in one direction: of
memory, between the chips of a slice (ICI) or a node (NVLink), and into the slower network (DCN).
TPUs: the pages of cloud.google.com/tpu/docs on v4, v5e, v5p and v6e, whose "bidirectional" numbers
are halved; a pod's network is divided by its chips. GPUs: NVIDIA's data sheets of A100, H100 and
H200 (SXM), half of NVLink's total, and one network adapter per GPU as in DGX systems (200 Gb/s
beside an A100, 400 Gb/s beside the others). Which slices exist is from the pages on TPUs, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from moezoo.errors import UserError, unknown


class Chip(NamedTuple):
    """One chip.

    flops: operations per second, bfloat16, two per multiply-add.   memory: bytes; None where a chip
    of this name comes with several sizes.   hbm, ici, dcn: bytes per second; None where nothing is
    published.
    """

    name: str
    flops: float
    memory: float | None
    hbm: float | None = None
    ici: float | None = None
    dcn: float | None = None


V5E = Chip("TPU v5e", 197e12, 16e9, 819e9, 200e9, 6.4e12 / 8 / 256)
# By the start of a topology's name, as `moezoo plan --topology` has it.
TPUS = {
    "v4": Chip("TPU v4", 275e12, 32e9, 1228e9, 300e9),
    "v5e": V5E,
    "v5litepod": V5E,
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2765e9, 600e9, 50e9 / 8),
    "v6e": Chip("TPU v6e", 918e12, 32e9, 1638e9, 400e9, 100e9 / 8),
}
GPUS = (
    Chip("A100", 312e12, None, None, 300e9, 25e9),
    Chip("H100", 989e12, None, 3350e9, 450e9, 50e9),
    Chip("H200", 989e12, None, 4800e9, 450e9, 50e9),
)
# GPUs by the start of a topology's name; of each size of memory one.
CARDS = {
    "a100-40gb": Chip("A100 40 GB", 312e12, 40e9, 1555e9, 300e9, 25e9),
    "a100-80gb": Chip("A100 80 GB", 312e12, 80e9, 2039e9, 300e9, 25e9),
    "h100": Chip("H100 80 GB", 989e12, 80e9, 3350e9, 450e9, 50e9),
    "h200": Chip("H200 141 GB", 989e12, 141e9, 4800e9, 450e9, 50e9),
}
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
# Slices of chips that lie in a plane, and of those that lie in cubes of 64 chips, up to one cube.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
WITHIN_A_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
SIDE = 4  # chips, of a cube
# The most chips of a slice of cubes; kinds that are not named here lie in a plane.
CUBES = {"v4": 4096, "v5p": 6144}


def chips_of_slice(topology: str) -> int:
    """Number of chips of a slice of TPUs such as v5p:2x2x4; UserError where none such exists."""
    kind, _, sides = topology.partition(":")
    if kind not in TPUS:
        raise unknown("kind of TPU", kind, list(TPUS))
    known = sides in (WITHIN_A_CUBE if kind in CUBES else FLAT)
    if not known and not (kind in CUBES and _cubes(sides, CUBES[kind])):
        raise UserError(f"There is no TPU slice '{topology}': {slices_text(kind)}.")
    return math.prod(int(side) for side in sides.split("x"))


def some_slice_has(kind: str, count: int) -> bool:
    """Whether a slice of so many chips exists."""
    if kind in CUBES and count % SIDE**3 == 0:
        return 0 < count <= CUBES[kind]
    listed = WITHIN_A_CUBE if kind in CUBES else FLAT
    return count in (chips_of_slice(f"{kind}:{sides}") for sides in listed)


def slices_text(kind: str) -> str:
    """Which slices of a kind of TPU exist."""
    if kind not in CUBES:
        return f"those of {kind} are {', '.join(FLAT[:-1])} and {FLAT[-1]}"
    return (
        f"those of {kind} are {', '.join(WITHIN_A_CUBE)} and, up to {CUBES[kind]} chips, three "
        f"multiples of {SIDE} of which none is smaller than the one before, such as 4x4x8"
    )


def _cubes(sides: str, most: int) -> bool:
    """Whether these are the sides of cubes in Google's order."""
    parts = [int(part) for part in sides.split("x") if part.isascii() and part.isdigit()]
    plain = "x".join(map(str, sorted(parts))) == sides and len(parts) == 3
    whole = all(part and part % SIDE == 0 for part in parts)
    return plain and whole and math.prod(parts) <= most


def of_topology(topology: str) -> Chip | None:
    """The chip of a topology such as "v5p:2x2x4" or "h100:16"; None where it is not known here."""
    name = topology.partition(":")[0]
    return TPUS.get(name) or CARDS.get(name)


def of_kind(kind: str) -> Chip | None:
    """The chip that JAX calls so (`Device.device_kind`); None where it is not known here."""
    if kind in KINDS:
        return TPUS[KINDS[kind]]
    return next((chip for chip in GPUS if chip.name in kind), None)
