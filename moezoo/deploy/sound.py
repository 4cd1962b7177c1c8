"""Sound files as what an exported classifier of clips reads: decoded, cut, turned into features.

A copy travels in exports of sound runs, beside `photo.py` and `data/audio/fbank.py`. Needs NumPy
and SciPy, which comes with JAX; other files than WAV need the package soundfile.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo.data.audio import fbank
    from moezoo.deploy.photo import ExportError
else:
    import fbank  # pyright: ignore[reportMissingImports]
    from photo import ExportError  # pyright: ignore[reportMissingImports]

Steps = Sequence[Mapping[str, Any]]
# SciPy leaves whole numbers as they are stored; these are the middle and the size of full scale.
SCALE = {"uint8": (128.0, 128.0), "int16": (0.0, 2.0**15), "int32": (0.0, 2.0**31)}


def read(path: str | Path, steps: Steps) -> np.ndarray:
    """A sound file as a mono waveform float32 [N] of the rate that the manifest's steps ask for.

    Raises ExportError when the file is missing, no sound, or has no finite samples.
    """
    wave_NC, rate = _decode(Path(path))
    if not len(wave_NC) or not np.isfinite(wave_NC).all():
        raise ExportError(f"{path} has no samples, or some that are not finite numbers.")
    how = _step(steps, "mono")["how"]
    wave_N = wave_NC[:, 0] if how == "first" else wave_NC.mean(axis=1)
    return fbank.resampled(wave_N, rate, _step(steps, "resample")["rate"])


def _decode(path: Path) -> tuple[np.ndarray, int]:
    """Samples float32 [N, channels] in [-1, 1] and their rate."""
    if not path.is_file():
        raise ExportError(f"There is no sound file {path}.")
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: libsndfile itself is missing
        return _decode_wav(path)
    try:
        return soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError, ValueError, TypeError) as error:
        raise ExportError(f"{path} cannot be read as sound.") from error


def _decode_wav(path: Path) -> tuple[np.ndarray, int]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():  # of chunks that hold no sound
            warnings.simplefilter("ignore")
            rate, stored = wavfile.read(path)
    except (OSError, ValueError, EOFError) as error:
        raise ExportError(
            f"{path} cannot be read as WAV sound; for FLAC, OGG and MP3 install soundfile."
        ) from error
    middle, size = SCALE.get(stored.dtype.name, (0.0, 1.0))
    wave = ((stored.astype(np.float64) - middle) / size).astype(np.float32)
    return wave if wave.ndim == 2 else wave[:, None], rate


def prepare(clips: Any, shape: tuple[int, int], steps: Steps) -> np.ndarray:
    """The network's input from waveforms: the manifest's `preprocess`, float32 [B, frames, bands].

    clips: mono waveforms float32 [N] of the manifest's rate, of any lengths; or already features
    [B, frames, bands]. Raises ExportError for any other form and for clips shorter than a window.
    """
    if getattr(clips, "ndim", 0) == 3:
        if clips.dtype != np.float32 or clips.shape[1:] != shape or not len(clips):
            raise ExportError(
                f"Features must be float32 [batch, {shape[0]}, {shape[1]}], these are "
                f"{clips.dtype} {list(clips.shape)}."
            )
        return clips
    if not len(clips):
        raise ExportError("There is no clip to predict.")
    rate = _step(steps, "resample")["rate"]
    return np.stack([_features(np.asarray(clip), shape, rate) for clip in clips])


def _features(wave_N: np.ndarray, shape: tuple[int, int], rate: int) -> np.ndarray:
    if wave_N.ndim != 1 or wave_N.dtype != np.float32:
        raise ExportError(
            f"A clip must be a waveform float32 [samples], not {wave_N.dtype} {list(wave_N.shape)}."
        )
    if len(wave_N) < fbank.window_of(rate) or not np.isfinite(wave_N).all():
        raise ExportError(
            f"A clip of {len(wave_N)} samples is too short or not finite: at least "
            f"{fbank.window_of(rate)} finite ones are needed at {rate} per second."
        )
    return fbank.features(wave_N, *shape, rate)[0]


def spectrogram(audio_TF: np.ndarray, scale: int = 4) -> np.ndarray:
    """Features as a grey picture, uint8 [height, width, 3]: time to the right, low bands below.

    Under it is room for a name.
    """
    low, high = float(audio_TF.min()), float(audio_TF.max())
    grey = np.round(255 * (audio_TF - low) / max(high - low, 1e-6)).astype(np.uint8)
    upright = np.kron(grey.T[::-1], np.ones((scale, scale), np.uint8))
    room = np.zeros((len(upright) // 4 + 12, upright.shape[1]), np.uint8)
    return np.repeat(np.concatenate([upright, room])[..., None], 3, axis=-1)


def _step(steps: Steps, name: str) -> Mapping[str, Any]:
    found = [step for step in steps if step.get("step") == name]
    if len(found) != 1:
        raise ExportError(f"The manifest's preprocess has {len(found)} steps '{name}', not one.")
    return found[0]
