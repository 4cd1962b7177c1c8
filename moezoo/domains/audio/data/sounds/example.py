"""One finished clip: an event in a register, in a room, under noise, at some level."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from moezoo.domains.audio.data.sounds.acoustics import ROOMS, mixed, reverberated
from moezoo.domains.audio.data.sounds.events import EVENTS
from moezoo.domains.audio.data.sounds.synth import RATE, scaled

REGISTERS: dict[str, tuple[float, float]] = {  # Hz
    "low": (140.0, 260.0),
    "mid": (400.0, 740.0),
    "high": (1150.0, 2100.0),
}
SECONDS = 1.0
NAMES: dict[str, tuple[str, ...]] = {
    "event": tuple(EVENTS),
    "register": tuple(REGISTERS),
    "room": tuple(ROOMS),
}


class Clip(NamedTuple):
    """int16 samples at 16 kHz, and what is heard in them, by task."""

    wave: np.ndarray
    heard: dict[str, str]


def synthesise(seed: int, split: str, index: int, events: tuple[str, ...]) -> Clip:
    """The clip (seed, split, index) of a data set with these events, in turn."""
    key = np.array([seed % 2**63, zlib.crc32(split.encode()) << 32 | index], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    register, room = (str(rng.choice(NAMES[task])) for task in ("register", "room"))
    heard = {"event": events[index % len(events)], "register": register, "room": room}
    return Clip(_recorded(heard, rng), heard)


def _recorded(heard: dict[str, str], rng: np.random.Generator) -> np.ndarray:
    low, high = np.log(REGISTERS[heard["register"]])
    hertz = float(np.exp(rng.uniform(low, high)))
    count, onset = int(RATE * rng.uniform(0.4, 0.75)), int(RATE * rng.uniform(0.02, 0.2))
    wave = np.zeros(int(RATE * SECONDS))
    event = slice(onset, onset + count)
    wave[event] = scaled(EVENTS[heard["event"]](hertz, count, rng))
    wave = reverberated(wave, ROOMS[heard["room"]], rng)
    wave = mixed(wave, event, rng.uniform(-3.0, 20.0), rng)
    peak = 10 ** (rng.uniform(-24.0, -1.0) / 20)
    return np.round(32767 * peak * scaled(wave)).astype(np.int16)
