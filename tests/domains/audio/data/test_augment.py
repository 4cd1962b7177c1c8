"""Variations of features."""

from __future__ import annotations

import numpy as np
import pytest

from moezoo.domains.audio.data import augment
from moezoo.domains.audio.data.augment import Strength
from moezoo.errors import UserError

STRENGTH = Strength(freq_mask=6, time_mask=9, noise=0.1, roll=3)


def example() -> dict[str, np.ndarray]:
    audio = 1.0 + np.arange(20 * 12, dtype=np.float32).reshape(20, 12)
    return {"audio": audio, "frames": np.int32(15), "event": np.uint8(2)}


def varied(name: str, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=seed))
    return augment.named(name, STRENGTH)(example(), rng)


@pytest.mark.parametrize("name", augment.AUGMENTATIONS)
def test_every_variation_repeats_itself_and_leaves_its_input(name: str) -> None:
    before = example()
    made = augment.named(name, STRENGTH)(before, np.random.default_rng(1))
    np.testing.assert_array_equal(before["audio"], example()["audio"])
    assert made["audio"].shape == (20, 12) and made["audio"].dtype == np.float32
    assert made["event"] == 2 and made["frames"] == 15
    np.testing.assert_array_equal(varied(name, 7)["audio"], varied(name, 7)["audio"])
    assert len({varied(name, seed)["audio"].tobytes() for seed in range(20)}) > 4


@pytest.mark.parametrize(("name", "axis", "most"), [("freq_mask", 1, 6), ("time_mask", 0, 9)])
def test_masks_hide_whole_bands_or_frames_next_to_each_other(name, axis, most) -> None:
    widths, first, last = set(), 99, 0
    for seed in range(300):
        hidden = varied(name, seed)["audio"] == 0
        lines = hidden.all(axis=1 - axis)
        assert hidden.sum() == lines.sum() * hidden.shape[1 - axis]
        (places,) = np.nonzero(lines)
        widths.add(len(places))
        if len(places):
            assert places[-1] - places[0] == len(places) - 1
            first, last = min(first, places[0]), max(last, places[-1])
    assert widths == set(range(most)) and first == 0 and last >= hidden.shape[axis] - 2


def test_a_mask_wider_than_the_clip() -> None:
    wide = Strength(time_mask=1000)
    made = augment.time_mask(example(), np.random.default_rng(0), wide)["audio"]
    assert made.shape == (20, 12)


def test_noise_and_shift() -> None:
    added = varied("noise", 3)["audio"] - example()["audio"]
    assert -1e-4 <= added.min() and 0 < added.max() <= 0.1 + 1e-4
    for seed in range(30):
        shifted = varied("roll", seed)["audio"]
        np.testing.assert_array_equal(shifted[15:], example()["audio"][15:])
        by = int(np.abs(shifted[:15, :1] - example()["audio"][0, 0]).argmin())
        assert min(by, 15 - by) <= 3
        np.testing.assert_array_equal(np.roll(shifted[:15], -by, 0), example()["audio"][:15])


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="did you mean time_mask"):
        augment.sequence(["time_mas"], STRENGTH)
