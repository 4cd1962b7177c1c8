"""Reading sound files as mono waveforms of one rate; what is wrong with one is one sentence.

WAV is read without any package, FLAC, OGG and MP3 through soundfile (libsndfile); see `decode`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moezoo.domains.audio.data import decode
from moezoo.domains.audio.data.decode import Mono, average, first
from moezoo.domains.audio.data.fbank import RATE, WINDOW, resampled, window_of
from moezoo.errors import UserError

__all__ = ["Mono", "average", "checked", "first", "read", "resampled", "whole_steps"]
AGAIN = "replace the file or take it out of the data set"


def read(
    path: Path, rate: int = RATE, mono: Mono = average, frames: int | None = None
) -> np.ndarray:
    """A sound file as float32 [N] at `rate`; of a longer one what so many frames reach over.

    Raises UserError for a file that is missing, no sound, shorter than one window of the
    filterbank, or has samples that are not finite or on another scale than 1.
    """
    try:
        return checked(decode.read(path, rate, mono, frames), rate, path)
    except decode.SoundError as error:
        raise UserError(f"'{path}' {error}: {AGAIN}.") from error
    except decode.NoSoundfile as error:
        raise UserError(
            f"'{path}' {error}; such files are read with the package soundfile, which cannot be "
            "loaded here: install the extra with pip install 'moezoo[audio]'."
        ) from error


def checked(wave_N: np.ndarray, rate: int, where: Any) -> np.ndarray:
    """The waveform; UserError where it is shorter than one window."""
    if len(wave_N) < window_of(rate):
        raise UserError(
            f"'{where}' is {len(wave_N) / rate * 1000:.0f} ms long, shorter than one window of "
            f"{WINDOW * 1000:.0f} ms: {AGAIN}."
        )
    return wave_N


def whole_steps(stored: np.ndarray, where: Any) -> np.ndarray:
    """Samples stored as 16-bit whole numbers, of any type, as float32 in [-1, 1].

    Raises UserError where they are none.
    """
    found = np.asarray(stored)
    if (
        found.ndim != 1
        or found.dtype.kind not in "iu"
        or np.abs(found, dtype=float).max(initial=0) > 2**15
    ):
        raise UserError(f"{where} is no sound of 16-bit samples: {AGAIN}.")
    return found.astype(np.float32) / 2**15
