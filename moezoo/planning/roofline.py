"""How long a step takes at least: its operations, its memory and its traffic at published speeds.

A bound, not a forecast: everything overlaps with everything else, every link is full, and a chip's
links carry any pattern. No run is faster; how much slower it is, a profile says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from moezoo.planning.collectives import Collective
from moezoo.train.chips import Chip
from moezoo.train.mesh import AXES, MeshSizes, outer


class TrafficRow(NamedTuple):
    """All operations of one kind over the same axes of the mesh, of one chip in one step.

    ici_bytes go between chips of a slice (or a node), dcn_bytes between slices. The seconds are at
    least; None where the chip's speed is not known.
    """

    kind: str
    axes: str
    count: int
    ici_bytes: float
    dcn_bytes: float
    ici_seconds: float | None
    dcn_seconds: float | None


class StepBound(NamedTuple):
    """The seconds that a step takes at least, by what takes them, and the MFU that follows.

    seconds: the largest of them. by: its name. mfu: the operations' share of it, at most 1. What is
    None is not known.
    """

    compute: float | None
    memory: float | None
    ici: float | None
    dcn: float | None
    seconds: float | None
    by: str | None
    mfu: float | None


def slices_of(sizes: MeshSizes, shape: Mapping[str, int]) -> np.ndarray:
    """The number of the slice of each device, in the order of the mesh."""
    over = outer(sizes)
    whole = [shape[axis] for axis in AXES]
    places = np.indices(whole).reshape(len(AXES), -1)
    parts = [at // (n // k) for at, n, k in zip(places, whole, over, strict=True)]
    return np.ravel_multi_index(parts, over)


def links(one: Collective, slices: Sequence[int] | np.ndarray) -> tuple[float, float]:
    """Bytes that one device sends inside its slice and between slices.

    Between slices every operation goes once through the slower network, shared out over the chips
    of a slice: an all-reduce of b bytes over s slices of g chips sends 2 b (g-1)/g inside and
    2 b/g (s-1)/s outside.
    """
    count = len({int(slices[member]) for member in one.members})
    if count == 1:
        return one.sent, 0.0
    total, inner = float(one.bytes * one.times), one.group / count
    if one.kind in ("collective-permute", "collective-broadcast"):
        return 0.0, total
    inside, outside = (inner - 1) / inner, (count - 1) / count
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        return total / count * inside, total * outside
    twice = 2 if one.kind == "all-reduce" else 1
    return twice * total * inside, twice * total / inner * outside


def table(
    found: Iterable[Collective],
    shape: Mapping[str, int],
    slices: np.ndarray,
    chip: Chip | None,
) -> list[TrafficRow]:
    """The operations of a step, the one with most bytes first."""

    def key(one: Collective) -> tuple[str, str]:
        return one.kind, "+".join(one.axes(shape))

    rows = []
    for (kind, axes), group in groupby(sorted(found, key=key), key):
        own = list(group)
        ici, dcn = (sum(part) for part in zip(*(links(one, slices) for one in own), strict=True))
        speeds = (None, None) if chip is None else (chip.ici, chip.dcn)
        seconds = [_at(n, speed) for n, speed in zip((ici, dcn), speeds, strict=True)]
        rows.append(TrafficRow(kind, axes, sum(one.times for one in own), ici, dcn, *seconds))
    return sorted(rows, key=lambda row: -(row.ici_bytes + row.dcn_bytes))


def _at(amount: float, speed: float | None) -> float | None:
    if amount == 0:
        return 0.0
    return None if speed is None else amount / speed


def bound(
    flops: float, moved: float | None, traffic: Sequence[TrafficRow], chip: Chip | None
) -> StepBound:
    """The least time of a step of so many operations and bytes of memory on one chip.

    moved: bytes that its memory reads and writes; None where that is not known.
    """
    compute = None if chip is None else flops / chip.flops
    memory = None if chip is None or moved is None else _at(moved, chip.hbm)
    ici, dcn = (_sum(getattr(row, name) for row in traffic) for name in _SECONDS)
    parts = {"compute": compute, "memory": memory, "ici": ici, "dcn": dcn}
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    if compute is None or dcn is None or ici is None:
        return StepBound(compute, memory, ici, dcn, None, None, None)
    by = max(known, key=lambda name: known[name])
    share = compute / known[by] if known[by] else None
    return StepBound(compute, memory, ici, dcn, known[by], by, share)


_SECONDS = ("ici_seconds", "dcn_seconds")


def _sum(parts: Iterable[float | None]) -> float | None:
    known = list(parts)
    return None if None in known else sum(part for part in known if part is not None)


def busiest(mean: float, parts: int) -> float:
    """The largest of `parts` loads over their mean where every choice is as likely.

    The leading term for many independent loads, 1 + sqrt(2 ln P / mean): with fewer tokens per
    expert the busiest is further from the mean, however well a router is trained.
    """
    if parts < 2 or mean <= 0:
        return 1.0
    return 1.0 + math.sqrt(2.0 * math.log(parts) * (1.0 - 1.0 / parts) / mean)
