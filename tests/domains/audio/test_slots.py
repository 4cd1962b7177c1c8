"""Pictures of slots: which maps are shown, and that every shape of mixture can be drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moezoo.domains.audio import report as slot_pictures


def maps(layers: int, rows: int, experts: int = 3, slots: int = 2) -> dict:
    rng = np.random.default_rng(0)
    shape = (rows, experts, slots, 2, 4)
    return {
        f"blocks/{i}/attn/adapter": (rng.random(shape), rng.random(shape)) for i in range(layers)
    }


def test_a_few_layers_or_the_last_by_task() -> None:
    shared = maps(7, 1)
    shown = slot_pictures.chosen(shared, ("event", "room"))
    assert list(shown) == [f"blocks/{i}/attn/adapter" for i in (0, 3, 6)]
    np.testing.assert_array_equal(
        shown["blocks/3/attn/adapter"][1], shared["blocks/3/attn/adapter"][1][0]
    )
    own = maps(4, 2)
    shown = slot_pictures.chosen(own, ("event", "room"))
    assert list(shown) == ["blocks/3/attn/adapter, event", "blocks/3/attn/adapter, room"]
    wanted = own["blocks/3/attn/adapter"][0][1]
    np.testing.assert_array_equal(shown["blocks/3/attn/adapter, room"][0], wanted)
    assert slot_pictures.chosen({}, ("event",)) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "slots"), [(1, 1), (3, 2), (20, 1)])
def test_it_is_drawn(experts: int, slots: int, tmp_path: Path) -> None:
    path = tmp_path / "slots.png"
    slot_pictures.slots(path, np.zeros((9, 5)), {})
    assert not path.exists()
    shown = slot_pictures.chosen(maps(2, 1, experts, slots), ("event",))
    slot_pictures.slots(path, np.random.default_rng(0).normal(size=(9, 5)), shown)
    assert path.read_bytes().startswith(b"\x89PNG")
