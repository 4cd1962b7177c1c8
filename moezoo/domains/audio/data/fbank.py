"""Log-mel filterbank features as Kaldi computes them, with the settings of AST.

Gong, Chung, Glass, Interspeech 2021 (arXiv:2104.01778), section 3.1: windows of 25 ms every 10 ms,
mel bands from 20 Hz to half the rate, the statistics of AudioSet. In detail as
`ASTFeatureExtractor` of Hugging Face: the waveform is not scaled to 16-bit integers and its mean
is not removed (the original AST removes it), windows are Hann ones, there is no dither and no
energy, and clips are padded with log-mel 0 before they are normalised. In float64 inside, where
the reference has float32.

Imports nothing of the package, because a copy travels in the exports of sound runs.
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import numpy as np

RATE = 16_000
RATES = (1_000, 1_000_000)  # samples per second of anything that is resampled, both included
FINEST = 1 << 15  # terms of a ratio of rates; the resampling filter has 20 times as many numbers
MEAN, STD = -4.2677393, 4.5689974  # AudioSet
WINDOW, HOP = 0.025, 0.010  # seconds
LOWEST = 20.0  # Hz
PREEMPHASIS = 0.97
# How a manifest says what cannot be chosen.
FIXED = {"window_seconds": WINDOW, "hop_seconds": HOP, "window": "hann"}
FIXED |= {"lowest_hertz": LOWEST, "preemphasis": PREEMPHASIS}
FLOOR = float(np.finfo(np.float32).eps)  # under the logarithm


def window_of(rate: int) -> int:
    """Samples of one window; a shorter clip has no frame."""
    return int(rate * WINDOW)


def frames_of(samples: int, rate: int = RATE) -> int:
    """Whole windows in a clip of so many samples."""
    window, hop = window_of(rate), int(rate * HOP)
    return 1 + (samples - window) // hop if samples >= window else 0


def samples_of(frames: int, rate: int = RATE) -> int:
    """The samples that so many whole windows reach over."""
    return window_of(rate) + (frames - 1) * int(rate * HOP)


def mel(hertz: np.ndarray | float) -> np.ndarray:
    """Kaldi's mel scale, 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(np.asarray(hertz, np.float64) / 700.0)


def hertz(mels: np.ndarray | float) -> np.ndarray:
    """The inverse of `mel`."""
    return 700.0 * np.expm1(np.asarray(mels, np.float64) / 1127.0)


def centres(bands: int, rate: int = RATE) -> np.ndarray:
    """The middle of every band in Hz, [F]."""
    low, high = mel(LOWEST), mel(rate / 2)
    return hertz(low + np.arange(1, bands + 1) * (high - low) / (bands + 1))


@lru_cache(maxsize=8)
def triangles(bands: int, size: int, rate: int) -> np.ndarray:
    """Weights [size / 2 + 1, F] of the power spectrum's lines in each band, linear in mel.

    Bands narrower than the lines' distance are empty, as in Kaldi.
    """
    low, high = mel(LOWEST), mel(rate / 2)
    # Rounded as the reference rounds it: the slopes of bands with one line near their edge show it.
    width, place = np.float32((high - low) / (bands + 1)), np.arange(bands, dtype=np.float32)
    left, centre, right = (np.float32(low) + (place + np.float32(k)) * width for k in range(3))
    lines = np.float32(rate / size) * np.arange(size // 2, dtype=np.float32)
    # NumPy's float32 logarithm is off by up to a whole unit in the last place, PyTorch's by less.
    logarithm = np.log((1 + lines / np.float32(700)).astype(np.float64)).astype(np.float32)
    line = (np.float32(1127) * logarithm)[:, None]
    rising, falling = (line - left) / (centre - left), (right - line) / (right - centre)
    weights = np.maximum(np.float32(0), np.minimum(rising, falling))
    last = np.zeros((1, bands))  # the last line is in no band
    return np.concatenate([weights.astype(np.float64), last])


def fbank(wave_N: np.ndarray, bands: int = 128, rate: int = RATE) -> np.ndarray:
    """Log-mel energies float32 [T, F] of a mono waveform in [-1, 1].

    T is `frames_of`: windows that would reach over the end are left out.
    """
    window, hop = window_of(rate), int(rate * HOP)
    count = frames_of(len(wave_N), rate)
    if not count:
        return np.zeros((0, bands), np.float32)
    all_windows = np.lib.stride_tricks.sliding_window_view(np.asarray(wave_N, np.float64), window)
    x_TN = all_windows[: hop * count : hop]
    x_TN = x_TN - x_TN.mean(axis=1, keepdims=True)
    before = np.concatenate([x_TN[:, :1], x_TN[:, :-1]], axis=1)
    x_TN = (x_TN - PREEMPHASIS * before) * np.hanning(window)
    size = 1 << (window - 1).bit_length()
    spectrum = np.fft.rfft(x_TN, size)
    power = spectrum.real**2 + spectrum.imag**2
    # Not @: BLAS threads that wait for each other take ten times as long on busy cores.
    energy = np.einsum("tl,lf->tf", power, triangles(bands, size, rate))
    return np.log(np.maximum(energy, FLOOR)).astype(np.float32)


def normalise(logmel: np.ndarray) -> np.ndarray:
    """What AST reads: the mean of AudioSet off, over two of its deviations."""
    return ((logmel - MEAN) / (2 * STD)).astype(np.float32)


def denormalise(audio: np.ndarray) -> np.ndarray:
    """The inverse of `normalise`."""
    return audio * (2 * STD) + MEAN


def padded(logmel_TF: np.ndarray, frames: int) -> np.ndarray:
    """The first `frames` frames, with zeros behind a shorter clip, [frames, F]."""
    kept = logmel_TF[:frames]
    return np.concatenate([kept, np.zeros((frames - len(kept), kept.shape[1]), kept.dtype)])


def features(
    wave_N: np.ndarray, frames: int, bands: int = 128, rate: int = RATE
) -> tuple[np.ndarray, int]:
    """What a model reads of a clip: float32 [frames, F], and how many of them are the clip's."""
    logmel = fbank(wave_N, bands, rate)
    return normalise(padded(logmel, frames)), min(len(logmel), frames)


def ratio(own: int, rate: int) -> tuple[int, int]:
    """The whole numbers up and down, at most `FINEST`, whose quotient is rate / own.

    Exact for the rates that are in use; a rate such as 44,101 Hz, which has no small terms, is off
    by 2e-5 of itself at most. Raises ValueError for rates outside `RATES`.
    """
    low, high = RATES
    if not (low <= own <= high and low <= rate <= high):
        raise ValueError(f"from {own} to {rate} samples per second: only {low} to {high} are known")
    small = Fraction(min(own, rate), max(own, rate)).limit_denominator(FINEST)
    least, most = small.numerator, small.denominator
    return (least, most) if rate < own else (most, least)


def needed(samples: int, own: int, rate: int) -> int:
    """The samples at the rate `own` that decide the first `samples` ones at `rate`."""
    if own == rate:
        return samples
    up, down = ratio(own, rate)
    return ((samples - 1) * down + 10 * max(up, down)) // up + 1


def resampled(wave_N: np.ndarray, own: int, rate: int) -> np.ndarray:
    """The waveform at another rate, float32; low-pass filtered where that is lower.

    By SciPy's polyphase filter, because SciPy comes with JAX: features hardly see the difference to
    better filters, and a package more would be one more to install. Raises ValueError for rates
    outside `RATES`.
    """
    if own == rate:
        return np.asarray(wave_N, np.float32)
    up, down = ratio(own, rate)
    from scipy import signal  # a quarter of a second that other commands need not pay

    return signal.resample_poly(np.asarray(wave_N, np.float64), up, down).astype(np.float32)
