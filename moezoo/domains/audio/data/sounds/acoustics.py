"""What happens to a sound on its way: a room, other noise, a level."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moezoo.domains.audio.data.sounds.synth import RATE, Rng, Wave


class Reverberation(NamedTuple):
    """Ranges of a kind of room: seconds until the echo is 60 dB down, until it begins, its level.

    The level is that of the echo's energy over the direct sound's, in dB.
    """

    decay: tuple[float, float]
    delay: tuple[float, float]
    level: tuple[float, float]


ROOMS: dict[str, Reverberation | None] = {
    "dry": None,
    "small": Reverberation((0.2, 0.45), (0.002, 0.008), (-5.0, 2.0)),
    "hall": Reverberation((1.2, 2.5), (0.012, 0.04), (-5.0, 2.0)),
}


def response(room: Reverberation, rng: Rng) -> Wave:
    """A room's answer to a click: the click, then noise that decays, high frequencies faster."""
    seconds, delay, level = (rng.uniform(*span) for span in room)
    count = int(min(seconds, 1.0) * RATE)
    t = np.arange(count) / RATE
    late = rng.standard_normal(count) * 10 ** (-3 * t / seconds)
    dull = np.concatenate([late[:1], 0.5 * (late[1:] + late[:-1])])
    mixed = np.exp(-t / (0.3 * seconds)) * late + (1 - np.exp(-t / (0.3 * seconds))) * dull
    echo = mixed * 10 ** (level / 20) / np.sqrt((mixed**2).sum())
    return np.concatenate([[1.0], np.zeros(int(delay * RATE)), echo])


def reverberated(wave: Wave, room: Reverberation | None, rng: Rng) -> Wave:
    """The wave as it sounds in such a room, cut to its own length."""
    if room is None:
        return wave
    answer = response(room, rng)
    size = 1 << (len(wave) + len(answer) - 1).bit_length()
    spectrum = np.fft.rfft(wave, size) * np.fft.rfft(answer, size)
    return np.fft.irfft(spectrum, size)[: len(wave)]


def background(count: int, rng: Rng) -> Wave:
    """Noise of unit power, somewhere between white and brown, with some hum of the mains."""
    tilt = rng.uniform(0.0, 2.0)
    f = np.maximum(np.fft.rfftfreq(count, 1 / RATE), 40.0)
    made = np.fft.irfft(np.fft.rfft(rng.standard_normal(count)) * f ** (-tilt / 2), count)
    made /= np.sqrt(np.mean(made**2))
    t = np.arange(count) / RATE
    hum = sum(np.sin(2 * np.pi * 50 * k * t + rng.uniform(0, 6)) / k for k in (1, 2, 3))
    made = made + rng.uniform(0, 0.5) * hum
    return made / np.sqrt(np.mean(made**2))


def mixed(wave: Wave, event: slice, decibels: float, rng: Rng) -> Wave:
    """The wave over background noise; the event's own part is so many decibels above it."""
    power = float(np.mean(wave[event] ** 2))
    noise = background(len(wave), rng)
    return wave + noise * np.sqrt(power / 10 ** (decibels / 10))
