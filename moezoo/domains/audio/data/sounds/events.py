"""The sound events: functions (frequency, samples, rng) -> wave.

The frequency is where the register has the event's pitch or the middle of its band. What else
makes two of a kind differ (partials, rates, durations of decay) is drawn from `rng`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moezoo.domains.audio.data.sounds.synth import (
    RATE,
    Rng,
    Wave,
    edges,
    fading,
    harmonics,
    noise_between,
    partials,
    resonate,
    scattered,
    sweep,
    times,
)

Event = Callable[[float, int, Rng], Wave]
BELL = (0.56, 0.92, 1.0, 1.19, 1.71, 2.0, 2.74, 3.0, 3.76, 4.07)  # of a struck bar or bell
VOWELS = {  # first three formants of an adult's voice, Hz
    "a": (750.0, 1150.0, 2500.0),
    "e": (480.0, 1900.0, 2550.0),
    "i": (300.0, 2250.0, 3000.0),
    "o": (480.0, 850.0, 2450.0),
}


def _steady(count: int, hertz: float) -> Wave:
    return np.full(count, hertz)


def tone(hertz: float, count: int, rng: Rng) -> Wave:
    """A few harmonics at a constant pitch."""
    shares = rng.uniform(0.0, 0.5, 3) * (0.7, 0.5, 0.3)
    return harmonics(_steady(count, hertz), [1.0, *shares]) * edges(count, 0.02, 0.05)


def _glide(hertz: float, count: int, rng: Rng, sign: int) -> Wave:
    span = rng.uniform(0.8, 1.6) * sign  # octaves
    t = times(count) / (count / RATE) - 0.5
    return harmonics(hertz * 2.0 ** (span * t), [1.0, rng.uniform(0, 0.4)])


def chirp_up(hertz: float, count: int, rng: Rng) -> Wave:
    """A pitch that rises by about an octave."""
    return _glide(hertz, count, rng, 1) * edges(count, 0.02, 0.05)


def chirp_down(hertz: float, count: int, rng: Rng) -> Wave:
    """A pitch that falls by about an octave."""
    return _glide(hertz, count, rng, -1) * edges(count, 0.02, 0.05)


def bell(hertz: float, count: int, rng: Rng) -> Wave:
    """Partials that are no harmonics, the higher ones dying sooner."""
    slow = rng.uniform(0.15, 0.45)
    return partials(
        hertz, [(m, rng.uniform(0.3, 1) / (1 + 0.3 * m), slow / (0.6 + 0.5 * m)) for m in BELL],
        count,
    )  # fmt: skip


def gong(hertz: float, count: int, rng: Rng) -> Wave:
    """Frequency modulation at an irrational ratio whose depth swells and dies."""
    t, ratio = times(count), rng.uniform(1.35, 1.47)
    depth = rng.uniform(2.0, 4.0) * np.minimum(t / 0.06, 1.0) * np.exp(-t / 0.25)
    modulator = np.sin(2 * np.pi * ratio * hertz * t)
    made = np.sin(2 * np.pi * hertz * t + depth * modulator)
    return made * fading(count, rng.uniform(0.25, 0.5), 0.02)


def clicks(hertz: float, count: int, rng: Rng) -> Wave:
    """A regular train of very short resonances."""
    period = RATE / rng.uniform(7, 15)
    one = partials(hertz, [(1.0, 1.0, 0.003), (2.3, 0.6, 0.002)], RATE // 50)
    places = np.arange(0, count, period).astype(int)
    return scattered(count, [int(p) for p in places], [one] * len(places))


def knocks(hertz: float, count: int, rng: Rng) -> Wave:
    """Two to four thuds at irregular distances."""
    number = int(rng.integers(2, 5))
    gaps = rng.uniform(0.07, 0.17, number)
    places = [int(p) for p in (np.cumsum(gaps) - gaps[0]) * RATE]
    hits = []
    for loudness in rng.uniform(0.5, 1.0, number):
        body = partials(hertz * 0.6, [(1, 1, 0.03), (1.6, 0.7, 0.02), (2.9, 0.4, 0.01)], RATE // 8)
        tap = noise_between(len(body), hertz, 4 * hertz, rng) * fading(len(body), 0.006, 0.0005)
        hits.append(loudness * (body + 0.5 * tap))
    return scattered(count, places, hits)


def noise_band(hertz: float, count: int, rng: Rng) -> Wave:
    """Noise of a narrow band."""
    half = rng.uniform(1.08, 1.25)
    return noise_between(count, hertz / half, hertz * half, rng) * edges(count, 0.03, 0.06)


def hiss(hertz: float, count: int, rng: Rng) -> Wave:
    """Noise from a frequency upwards that swells."""
    swell = np.sin(np.pi * times(count) / (count / RATE)) ** rng.uniform(0.5, 2.0)
    return noise_between(count, hertz, min(8 * hertz, 7500.0), rng) * swell


def _vowel(name: str) -> Event:
    def sung(hertz: float, count: int, rng: Rng) -> Wave:
        pitch = 8.0 * np.sqrt(hertz)  # voices span less than the registers of other sounds
        size = (pitch / 190.0) ** 0.25 * rng.uniform(0.95, 1.05)  # small heads: high formants
        t = times(count)
        vibrato = 1 + 0.015 * np.sin(2 * np.pi * rng.uniform(4, 7) * t + rng.uniform(0, 6))
        drift = 1 + rng.uniform(-0.12, 0.12) * t
        source = harmonics(pitch * vibrato * drift, 1.0 / np.arange(1, 40) ** 1.3)
        breath = 0.03 * rng.standard_normal(count)
        formants = [size * f for f in VOWELS[name]]
        return resonate(source + breath, formants, (90.0, 110.0, 170.0)) * edges(count, 0.04, 0.08)

    sung.__doc__ = f"The vowel {name}: pulses of a voice through three formants."
    return sung


def siren(hertz: float, count: int, rng: Rng) -> Wave:
    """A pitch that goes slowly up and down."""
    place = times(count) * rng.uniform(2.0, 4.0) + rng.random()
    wave = 2 * np.abs(2 * (place % 1) - 1) - 1
    return harmonics(hertz * 2 ** (0.5 * wave), [1.0, 0.3]) * edges(count, 0.02, 0.05)


def warble(hertz: float, count: int, rng: Rng) -> Wave:
    """A pitch that trembles too fast to follow."""
    shake = np.sin(2 * np.pi * rng.uniform(18, 40) * times(count))
    return sweep(hertz * (1 + rng.uniform(0.08, 0.2) * shake)) * edges(count, 0.02, 0.05)


def alarm(hertz: float, count: int, rng: Rng) -> Wave:
    """Two pitches in turn."""
    second = ((times(count) * rng.uniform(4, 8)) % 1) > 0.5
    other = rng.uniform(1.2, 1.4)
    return harmonics(hertz * np.where(second, other, 1.0), [1.0, 0, 0.3]) * edges(count, 0.01, 0.03)


def tremolo(hertz: float, count: int, rng: Rng) -> Wave:
    """A steady pitch whose loudness trembles."""
    swing = 0.5 + 0.5 * np.sin(2 * np.pi * rng.uniform(6, 14) * times(count) + rng.uniform(0, 6))
    return tone(hertz, count, rng) * swing


def insect(hertz: float, count: int, rng: Rng) -> Wave:
    """A narrow hum, chopped quickly, in groups."""
    t = times(count)
    chop = np.clip(np.sin(2 * np.pi * rng.uniform(28, 60) * t), 0, 1)
    groups = (np.sin(2 * np.pi * rng.uniform(3, 6) * t + rng.uniform(0, 6)) > -0.4).astype(float)
    hum = sweep(_steady(count, 1.5 * hertz)) + 0.5 * sweep(_steady(count, 1.55 * hertz))
    return hum * chop * groups


def drum(hertz: float, count: int, rng: Rng) -> Wave:
    """A struck skin: a falling low pitch and a burst of noise."""
    t = times(count)
    pitch = 0.4 * hertz * (1 + 1.2 * np.exp(-t / 0.03))
    body = sweep(pitch) * fading(count, rng.uniform(0.08, 0.18))
    rattle = noise_between(count, hertz, min(6 * hertz, 7500.0), rng)
    return body + rng.uniform(0.1, 0.3) * rattle * fading(count, rng.uniform(0.03, 0.08))


def pluck(hertz: float, count: int, rng: Rng) -> Wave:
    """A string: harmonics that die the sooner the higher they are."""
    place, slow = rng.uniform(0.1, 0.4), rng.uniform(0.2, 0.5)
    return partials(
        hertz,
        [(k, np.sin(np.pi * k * place) / k, slow / (1 + 0.25 * k)) for k in range(1, 20)],
        count,
    )


def buzz(hertz: float, count: int, rng: Rng) -> Wave:
    """All harmonics, as of a saw."""
    fall = rng.uniform(0.8, 1.1)
    hum = harmonics(_steady(count, 0.6 * hertz), 1 / np.arange(1, 25) ** fall)
    return hum * edges(count, 0.02, 0.05)


def reed(hertz: float, count: int, rng: Rng) -> Wave:
    """Odd harmonics only, as of a clarinet."""
    k = np.arange(1, 20)
    shares = np.where(k % 2 == 1, 1.0 / k ** rng.uniform(0.8, 1.1), 0.0)
    return harmonics(_steady(count, 0.6 * hertz), shares) * edges(count, 0.05, 0.06)


def rain(hertz: float, count: int, rng: Rng) -> Wave:
    """Many small drops at random, each a short resonance."""
    number = int(rng.integers(40, 90))
    places = [int(p) for p in rng.integers(0, count, number)]
    drops = [
        a * partials(f, [(1.0, 1.0, 0.004)], RATE // 40)
        for a, f in zip(rng.random(number) ** 2, hertz * rng.uniform(0.8, 2.2, number), strict=True)
    ]
    return scattered(count, places, drops)


def bubbles(hertz: float, count: int, rng: Rng) -> Wave:
    """A few short pitches, each rising as it dies."""
    number = int(rng.integers(5, 11))
    places = [int(p) for p in rng.integers(0, max(int(0.9 * count), 1), number)]
    t = times(RATE // 12)
    made = [
        sweep(f * (1 + 7 * t)) * fading(len(t), 0.02, 0.004)
        for f in hertz * rng.uniform(0.7, 1.3, number)
    ]
    return scattered(count, places, made)


EVENTS: dict[str, Event] = {
    "tone": tone,
    "chirp up": chirp_up,
    "bell": bell,
    "clicks": clicks,
    "noise band": noise_band,
    "vowel a": _vowel("a"),
    "vowel i": _vowel("i"),
    "siren": siren,
    "tremolo": tremolo,
    "drum": drum,
    "buzz": buzz,
    "rain": rain,
    "chirp down": chirp_down,
    "gong": gong,
    "knocks": knocks,
    "hiss": hiss,
    "vowel e": _vowel("e"),
    "vowel o": _vowel("o"),
    "warble": warble,
    "alarm": alarm,
    "insect": insect,
    "pluck": pluck,
    "reed": reed,
    "bubbles": bubbles,
}
