"""Which slices of TPUs exist."""

from __future__ import annotations

import pytest

from moezoo.errors import UserError
from moezoo.train.chips import CUBES, FLAT, TPUS, WITHIN_A_CUBE, chips_of_slice, some_slice_has


def test_slices_that_exist() -> None:
    counts = [chips_of_slice(f"v5e:{sides}") for sides in FLAT]
    assert counts == [1, 4, 8, 16, 32, 64, 128, 256]
    assert [chips_of_slice(f"v4:{sides}") for sides in WITHIN_A_CUBE] == [4, 8, 16, 32, 64]
    assert chips_of_slice("v5p:16x16x24") == CUBES["v5p"] == 6144
    assert {kind: chips_of_slice(f"{kind}:8x8x8") for kind in CUBES} == dict.fromkeys(CUBES, 512)
    found = [count for count in range(200) if some_slice_has("v5p", count)]
    assert found == [4, 8, 16, 32, 64, 128, 192]
    assert [count for count in range(300) if some_slice_has("v6e", count)] == counts


@pytest.mark.parametrize(
    "topology",
    ["v5e:3x5", "v5e:4x2", "v6e:16x32", "v6e:2x2x1", "v5e:", "v5p:2x2", "v5p:2x2x3", "v5p:4x4x6",
     "v4:8x4x4", "v4:0x4x4", "v5p:16x24x24", "v5p:4x4x-4", "v5p:4x4x04", "v5p:٤x٤x٤", "v5p"],
)  # fmt: skip
def test_slices_that_do_not(topology: str) -> None:
    with pytest.raises(UserError, match=f"There is no TPU slice '{topology}': those of v") as error:
        chips_of_slice(topology)
    assert "\n" not in str(error.value)


def test_unknown_kinds() -> None:
    with pytest.raises(UserError, match="Unknown kind of TPU 'v5'.*v5e"):
        chips_of_slice("v5:2x2")
    assert CUBES.keys() < TPUS.keys()
