"""What synthetic sounds are made of: oscillators, envelopes, noise, resonators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RATE = 16_000
Wave = np.ndarray  # float64 [N]
Rng = np.random.Generator


def times(count: int) -> Wave:
    """Seconds of so many samples."""
    return np.arange(count) / RATE


def sweep(hertz: Wave, phase: float = 0.0) -> Wave:
    """A sine whose frequency is given for every sample; silent where it is above half the rate."""
    turns = np.cumsum(hertz) / RATE
    return np.where(hertz < 0.48 * RATE, np.sin(2 * np.pi * turns + phase), 0.0)


def harmonics(hertz: Wave, amplitudes: Sequence[float] | Wave) -> Wave:
    """Sines at 1, 2, 3, ... times a frequency, those above half the rate left out."""
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    twice, before, this = 2 * np.cos(phase), np.zeros(len(phase)), np.sin(phase)
    total = np.zeros(len(phase))
    for k, amplitude in enumerate(amplitudes, 1):
        heard = k * hertz < 0.48 * RATE
        if not heard.any():
            break
        total += amplitude * (this * heard)
        before, this = this, twice * this - before  # sin((k + 1) x) from the two below it
    return total


def partials(hertz: float, table: Sequence[tuple[float, float, float]], count: int) -> Wave:
    """Decaying sines, one per (multiple of the frequency, amplitude, seconds to 1/e)."""
    t = times(count)
    total = np.zeros(count)
    for multiple, amplitude, seconds in table:
        if multiple * hertz < 0.48 * RATE:
            total += amplitude * np.exp(-t / seconds) * np.sin(2 * np.pi * multiple * hertz * t)
    return total


def edges(count: int, attack: float, release: float) -> Wave:
    """An envelope that rises from 0 and falls to 0 in these seconds, along half cosines."""
    t = times(count)
    rise = np.clip(t / attack, 0, 1)
    fall = np.clip((t[-1] - t) / release, 0, 1) if count else t
    return (0.5 - 0.5 * np.cos(np.pi * rise)) * (0.5 - 0.5 * np.cos(np.pi * fall))


def fading(count: int, seconds: float, attack: float = 0.002) -> Wave:
    """A quick rise and an exponential decay to 1/e in these seconds."""
    t = times(count)
    return np.minimum(t / attack, 1.0) * np.exp(-t / seconds)


def noise_between(count: int, low: float, high: float, rng: Rng) -> Wave:
    """Gaussian noise of unit power with soft edges of a tenth outside of these frequencies."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    f = np.maximum(np.fft.rfftfreq(count, 1 / RATE), 1.0)
    shape = 1 / (1 + (low / f) ** 20) / (1 + (f / high) ** 20)
    made = np.fft.irfft(spectrum * shape, count)
    return made / max(float(np.sqrt(np.mean(made**2))), 1e-9)


def resonate(source: Wave, formants: Sequence[float], widths: Sequence[float]) -> Wave:
    """The source through parallel resonances at these frequencies, of these widths in Hz.

    Each has the shape of a second-order resonator's response, applied in the spectrum.
    """
    f = np.fft.rfftfreq(len(source), 1 / RATE)
    shape = np.zeros(len(f), complex)
    for rank, (centre, width) in enumerate(zip(formants, widths, strict=True)):
        strength = (-1) ** rank * 0.6**rank  # neighbours of opposite sign leave no hole between
        shape += strength * 1j * width * f / (centre**2 - f**2 + 1j * width * f)
    return np.fft.irfft(np.fft.rfft(source) * shape, len(source))


def scattered(count: int, places: Sequence[int], sounds: Sequence[Wave]) -> Wave:
    """Short sounds added at these samples, cut off at the end."""
    total = np.zeros(count)
    for place, sound in zip(places, sounds, strict=True):
        if place < count:
            kept = sound[: count - place]
            total[place : place + len(kept)] += kept
    return total


def scaled(wave: Wave) -> Wave:
    """The same with its loudest sample at 1."""
    return wave / max(float(np.abs(wave).max(initial=0.0)), 1e-9)
