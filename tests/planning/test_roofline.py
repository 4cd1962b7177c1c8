"""The least time of a step: what crosses which links, and what bounds it."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.planning import roofline
from moezoo.planning.collectives import Collective
from moezoo.train import chips
from moezoo.train.chips import Chip
from moezoo.train.schema import MeshConfig

CHIP = Chip("made up", flops=100.0, memory=1000.0, hbm=50.0, ici=10.0, dcn=2.0)
FOUR, SLICES = (0, 1, 2, 3), np.array([0, 0, 1, 1])


def test_the_slice_of_every_device() -> None:
    shape = {"data": 4, "fsdp": 2, "expert": 1, "tensor": 1}
    assert roofline.slices_of(MeshConfig(), shape).tolist() == [0] * 8
    two = MeshConfig(fsdp=2, slices=2)
    assert roofline.slices_of(two, shape).tolist() == [0] * 4 + [1] * 4
    over = MeshConfig(fsdp=2, slices=2, fsdp_slices=2)
    assert roofline.slices_of(over, shape).tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        ("all-reduce", 2 * 80 / 2, 2 * 80 / 2 / 2),
        ("all-gather", 80 / 2, 80 / 2 / 2),
        ("reduce-scatter", 80 / 2, 80 / 2 / 2),
        ("all-to-all", 80 / 4, 80 / 2),
        ("collective-permute", 0, 80),
    ],
)
def test_what_crosses_the_slower_network(kind: str, inside: float, outside: float) -> None:
    members = (0, 2) if kind == "collective-permute" else FOUR
    assert roofline.links(Collective(kind, members, 80), SLICES) == (inside, outside)
    alone = Collective(kind, (0, 1), 80)
    assert roofline.links(alone, SLICES) == (alone.sent, 0.0)


def test_what_is_sent_between_two_slices_adds_up() -> None:
    """A chip sends as many bytes of an exchange to every other, wherever that lies."""
    one = Collective("all-to-all", FOUR, 80, times=3)
    assert sum(roofline.links(one, SLICES)) == one.sent


def test_the_slowest_part_bounds_the_step() -> None:
    shape = {"data": 4, "fsdp": 1, "expert": 1, "tensor": 1}
    found = [Collective("all-reduce", FOUR, 80), Collective("all-reduce", FOUR, 8)]
    rows = roofline.table(found, shape, SLICES, CHIP)
    assert [(row.kind, row.axes, row.count) for row in rows] == [("all-reduce", "data", 2)]
    assert rows[0].ici_seconds == 88 / 10 and rows[0].dcn_seconds == 44 / 2
    bound = roofline.bound(1000.0, 100.0, rows, CHIP)
    assert (bound.compute, bound.memory, bound.ici, bound.dcn) == (10.0, 2.0, 8.8, 22.0)
    assert (bound.seconds, bound.by) == (22.0, "dcn") and bound.mfu == 10.0 / 22.0
    near = roofline.bound(1000.0, 100.0, roofline.table(found, shape, SLICES * 0, CHIP), CHIP)
    assert near.by == "ici" and near.dcn == 0.0


def test_what_is_not_published_is_not_guessed() -> None:
    shape = {"data": 4, "fsdp": 1, "expert": 1, "tensor": 1}
    found = [Collective("all-reduce", FOUR, 80)]
    v4 = chips.of_topology("v4:2x2x2")
    assert v4 is not None and v4.dcn is None
    across = roofline.bound(1.0, None, roofline.table(found, shape, SLICES, v4), v4)
    assert across.seconds is None and across.dcn is None and across.ici is not None
    unknown = roofline.bound(1.0, 1.0, roofline.table(found, shape, SLICES, None), None)
    assert unknown == (None,) * 7


def test_chance_loads_the_busiest_as_the_bound_says() -> None:
    rng = np.random.default_rng(0)
    for mean, parts in ((1000, 8), (200, 64)):
        loads = rng.multinomial(mean * parts, [1 / parts] * parts, size=200)
        drawn = (loads.max(axis=1) / mean).mean()
        # The leading term lies a little above the mean of the maximum.
        assert drawn <= roofline.busiest(mean, parts) <= 1.0 + 2.0 * (drawn - 1.0)
    assert roofline.busiest(10, 1) == 1.0
