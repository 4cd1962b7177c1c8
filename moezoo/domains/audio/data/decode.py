"""A sound file as a mono waveform of one rate, of which no more is read than a model hears.

Everything is checked in the header before samples are decoded, and samples are mixed a block at a
time, so that memory depends on what is asked for and never on what a file declares. WAV is read
by `wav.py`; other files need the package soundfile (libsndfile).

Imports nothing of the package but what travels with it in the exports of sound runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

if __package__:
    from moezoo import regular
    from moezoo.domains.audio.data import fbank, wav
else:
    import fbank  # pyright: ignore[reportMissingImports]
    import regular  # pyright: ignore[reportMissingImports]
    import wav  # pyright: ignore[reportMissingImports]

# Raw samples, matrices and files of samplers, which libsndfile also knows, are no recordings.
FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "AIFF", "CAF", "AU")
LOUDEST = 8.0  # of full scale: floats may go beyond 1, numbers of whole steps begin far above
LARGEST = 1 << 40  # bytes
LONGEST = 1 << 25  # samples that are read where nothing says how many are heard
BLOCK = 1 << 20  # samples, over all channels
ENDLESS = 1 << 60  # samples of a file whose header does not say how many there are
Mono = Callable[[np.ndarray], np.ndarray]  # [N, channels] to [N]


class SoundError(Exception):
    """Why a file is no sound that can be used, as what follows its name, without a full stop."""


class NoSoundfile(Exception):
    """A file that needs the package soundfile, which cannot be loaded."""


def average(wave_NC: np.ndarray) -> np.ndarray:
    """The mean of all channels."""
    return wave_NC.mean(axis=1)


def first(wave_NC: np.ndarray) -> np.ndarray:
    """The first channel."""
    return wave_NC[:, 0]


def read(path: Path, rate: int, mono: Mono, frames: int | None = None) -> np.ndarray:
    """The sound as float32 [N] at `rate`: its beginning, as long as so many frames of a filterbank.

    frames: None reads all of it, if that is at most `LONGEST` samples. Raises SoundError for files
    that are missing, no regular ones or no sound, that are cut off or have samples that are not
    finite or of another scale than 1, and NoSoundfile.
    """
    regular.check(path, LARGEST, _refused(path))
    most = None if frames is None else fbank.samples_of(frames, rate)

    def needed(own: int) -> int:
        return LONGEST + 1 if most is None else fbank.needed(most, own, rate)

    try:
        with open(path, "rb") as file:
            own, made = _opened(path, file, needed)
            parts = [mono(checked(block).astype(np.float32)) for block in made]
    except (wav.WavError, OSError) as error:
        raise SoundError(getattr(error, "strerror", None) or str(error)) from error
    wave_N = np.concatenate(parts) if parts else np.zeros(0)
    if not len(wave_N):
        raise SoundError("has no samples")
    if most is None and len(wave_N) > LONGEST:
        raise SoundError(f"has more than {LONGEST} samples: say how many frames are wanted")
    return fbank.resampled(wave_N, own, rate)[:most]


def checked(wave: np.ndarray) -> np.ndarray:
    """Samples of any form that are finite and on the scale where 1 is full; SoundError else."""
    loudest = float(np.abs(wave).max(initial=0.0))
    if not np.isfinite(loudest):
        raise SoundError("has samples that are not finite numbers")
    if loudest > LOUDEST:
        raise SoundError(
            f"has samples up to {loudest:.6g} where 1 is full scale: its floats are whole steps, "
            "to be divided by their full scale (32768 of 16 bits)"
        )
    return wave


def _refused(path: Path) -> Callable[[str], SoundError]:
    """The sentence about a path as what follows its name."""
    return lambda sentence: SoundError(sentence.removeprefix(f"'{path}' ").removesuffix("."))


def _opened(
    path: Path, file: BinaryIO, needed: Callable[[int], int]
) -> tuple[int, Iterator[np.ndarray]]:
    """The rate, and the first `needed(rate)` samples as blocks [n, channels]."""
    if wav.is_wav(file):
        try:
            made = wav.layout(file)
            most = needed(_rate(made.rate))
            return made.rate, wav.blocks(file, made, most, BLOCK)
        except wav.OtherEncoding as error:
            return _by_soundfile(path, needed, str(error))
    return _by_soundfile(path, needed)


def _rate(own: int) -> int:
    low, high = fbank.RATES
    if not low <= own <= high:
        raise SoundError(f"has {own} samples per second, where {low} to {high} are read")
    return own


def _by_soundfile(
    path: Path, needed: Callable[[int], int], why: str = "is no WAV file"
) -> tuple[int, Iterator[np.ndarray]]:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing
        raise NoSoundfile(why) from error
    errors = (soundfile.SoundFileError, OSError, ValueError, TypeError, MemoryError)
    try:
        opened = soundfile.SoundFile(os.fspath(path))
    except errors as error:
        raise SoundError("cannot be read as sound") from error
    if opened.format not in FORMATS:
        opened.close()
        raise SoundError(f"is a file of the kind {opened.format}, not one of {', '.join(FORMATS)}")
    try:
        most = needed(_rate(opened.samplerate))
    except SoundError:
        opened.close()
        raise
    return opened.samplerate, _decoded(opened, most, errors)


def _decoded(opened: Any, most: int, errors: tuple[type[BaseException], ...]) -> Iterator:
    rows = max(BLOCK // opened.channels, 1)
    left = min(most, opened.frames)
    with opened:
        while left:
            try:
                block = opened.read(min(rows, left), dtype="float32", always_2d=True)
            except errors as error:
                raise SoundError(_why(opened.frames)) from error
            left -= len(block)
            if len(block):
                yield block
            elif opened.format == "FLAC":  # headers of MP3 only estimate a length
                raise SoundError(f"is cut off: {left} samples are missing")
            else:
                return


def _why(frames: int) -> str:
    if frames > ENDLESS:  # libsndfile then fails at the end, and the last samples are lost
        return "does not say how long it is, as streams do not: write it to a file again"
    return "cannot be read as sound: it is damaged or cut off"
