"""Reading sound files as mono waveforms of one rate; what is wrong with one is one sentence.

Files go through soundfile (libsndfile: WAV of every sample type, FLAC, OGG, MP3).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data.audio.fbank import RATE, WINDOW, resampled, window_of
from moezoo.errors import UserError

AGAIN = "replace the file or take it out of the data set"
Mono = Callable[[np.ndarray], np.ndarray]  # [N, channels] to [N]


def average(wave_NC: np.ndarray) -> np.ndarray:
    """The mean of all channels."""
    return wave_NC.mean(axis=1)


def first(wave_NC: np.ndarray) -> np.ndarray:
    """The first channel."""
    return wave_NC[:, 0]


def read(path: Path, rate: int = RATE, mono: Mono = average) -> np.ndarray:
    """A sound file as float32 [N] at `rate`.

    Raises UserError for a file that is missing, no sound, shorter than one window of the
    filterbank, or has samples that are not finite.
    """
    wave_NC, own = decode(path)
    if not len(wave_NC):
        raise UserError(f"'{path}' has no samples: {AGAIN}.")
    if not np.isfinite(wave_NC).all():
        raise UserError(f"'{path}' has samples that are not finite numbers: {AGAIN}.")
    return checked(resampled(mono(wave_NC), own, rate), rate, path)


def checked(wave_N: np.ndarray, rate: int, where: Any) -> np.ndarray:
    """The waveform; UserError where it is shorter than one window."""
    if len(wave_N) < window_of(rate):
        raise UserError(
            f"'{where}' is {len(wave_N) / rate * 1000:.0f} ms long, shorter than one window of "
            f"{WINDOW * 1000:.0f} ms: {AGAIN}."
        )
    return wave_N


def decode(path: Path) -> tuple[np.ndarray, int]:
    """Samples float32 [N, channels] in [-1, 1] and their rate.

    Raises UserError where the file is missing or no sound, or soundfile is.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: libsndfile itself is missing
        raise UserError(
            "Sound files are read with the package soundfile, which cannot be loaded here: install "
            "the extra with pip install 'moezoo[audio]'."
        ) from error
    if not path.is_file():
        raise UserError(f"The sound file '{path}' is missing: {AGAIN}.")
    try:
        return soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise UserError(f"'{path}' cannot be read as sound: {AGAIN}.") from error
