"""Clips as an exported model reads them: the reader of exports whose input is `audio`.

Files are decoded, cut, and turned into features. A copy is in such exports as `sound.py`,
beside `fbank.py`, `decode.py` and `wav.py`, so that files are read as in training. Needs NumPy and
SciPy, which comes with JAX; files other than WAV need the package soundfile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import forms
    from moezoo.deploy.runtime.forms import ExportError
    from moezoo.domains.audio.data import decode, fbank
else:
    import decode  # pyright: ignore[reportMissingImports]
    import fbank  # pyright: ignore[reportMissingImports]
    import forms  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]
    from forms import ExportError  # pyright: ignore[reportMissingImports]

Steps = Sequence[Mapping[str, Any]]
STEPS = forms.sequence(
    forms.step("mono", how=sc.one_of("average", "first")),
    forms.step("resample", rate=sc.whole(1_000, 768_000)),
    # `fbank` makes one kind of features: others would be taken for those.
    sc.table(
        {"step": sc.one_of("log_mel"), "bands": forms.SIDE}
        | {name: sc.one_of(value) for name, value in fbank.FIXED.items()},
        ("step", "bands"),
    ),
    forms.step("pad", frames=forms.SIDE, value=sc.one_of(0.0), longer=sc.one_of("cut")),
    forms.step("normalise", mean=sc.one_of(fbank.MEAN), std=sc.one_of(2 * fbank.STD)),
)
MONO = {"first": decode.first, "average": decode.average}


def fits(shape: Sequence[Any], steps: Steps, place: str) -> None:
    """Raise FormatFault if these steps do not lead to features [frames, bands] of this shape."""
    forms.need(len(shape) == 2, f"{place} is {['b', *shape]}, which is no such shape")
    made = [_step(steps, "pad")["frames"], _step(steps, "log_mel")["bands"]]
    forms.need(
        made == list(shape), f"preprocess makes {made} of an input, the program reads {list(shape)}"
    )


def read(path: str | Path, steps: Steps) -> np.ndarray:
    """A recording as a mono waveform float32 [N] at the rate that the manifest's steps require.

    Only the part of a long file that the steps keep is read. Raises ExportError if the file is
    missing, no recording, cut off, or has samples that are not finite or on a scale other than 1.
    """
    rate, how = _rate(steps), _step(steps, "mono")["how"]
    kept = [step["frames"] for step in steps if step.get("step") == "pad"]
    frames = kept[0] if kept else None
    if how not in MONO or not (frames is None or isinstance(frames, int) and frames > 0):
        raise ExportError(f"The manifest's preprocess mixes by '{how}' and keeps {frames} frames.")
    mono = MONO[how]
    try:
        return decode.read(Path(path), rate, mono, frames)
    except decode.SoundError as error:
        raise ExportError(f"'{path}' {error}.") from error
    except decode.NoSoundfile as error:
        raise ExportError(
            f"'{path}' {error}: for FLAC, OGG, MP3 and compressed WAV install soundfile."
        ) from error


def prepare(clips: Any, shape: Sequence[int], steps: Steps) -> np.ndarray:
    """The network's input from waveforms: the manifest's `preprocess`, float32 [B, frames, bands].

    clips: mono waveforms float32 [N] at the manifest's rate, of any lengths; or features already,
    [B, frames, bands]. Raises ExportError for any other form and for clips shorter than a window.
    """
    if getattr(clips, "ndim", 0) == 3:
        if clips.dtype != np.float32 or clips.shape[1:] != tuple(shape) or not len(clips):
            raise ExportError(
                f"Features must be float32 [batch, {shape[0]}, {shape[1]}], but these are "
                f"{clips.dtype} {list(clips.shape)}."
            )
        return clips
    if not len(clips):
        raise ExportError("There is no clip to predict.")
    rate = _rate(steps)
    return np.stack([_features(np.asarray(clip), shape, rate) for clip in clips])


def _features(wave_N: np.ndarray, shape: Sequence[int], rate: int) -> np.ndarray:
    if wave_N.ndim != 1 or wave_N.dtype != np.float32:
        raise ExportError(
            f"A clip must be a waveform float32 [samples], not {wave_N.dtype} {list(wave_N.shape)}."
        )
    if len(wave_N) < fbank.window_of(rate):
        raise ExportError(
            f"A clip of {len(wave_N)} samples is too short: at least {fbank.window_of(rate)} are "
            f"needed at {rate} per second."
        )
    (frames, bands), kept_N = shape, wave_N[: fbank.samples_of(shape[0], rate)]
    try:
        return fbank.features(decode.checked(kept_N), frames, bands, rate)[0]
    except decode.SoundError as error:
        raise ExportError(f"A clip {error}.") from error


def backdrop(example: np.ndarray, prepared: np.ndarray) -> np.ndarray:
    """The clip's spectrogram, with room below for a label."""
    return spectrogram(prepared)


def spectrogram(audio_TF: np.ndarray, scale: int = 4) -> np.ndarray:
    """Features as a grey picture, uint8 [height, width, 3]: time to the right, low bands below.

    There is room for a name under it.
    """
    low, high = float(audio_TF.min()), float(audio_TF.max())
    grey = np.round(255 * (audio_TF - low) / max(high - low, 1e-6)).astype(np.uint8)
    upright = np.kron(grey.T[::-1], np.ones((scale, scale), np.uint8))
    room = np.zeros((len(upright) // 4 + 12, upright.shape[1]), np.uint8)
    return np.repeat(np.concatenate([upright, room])[..., None], 3, axis=-1)


def _rate(steps: Steps) -> int:
    rate, (low, high) = _step(steps, "resample")["rate"], fbank.RATES
    if not isinstance(rate, int) or not low <= rate <= high:
        raise ExportError(
            f"The manifest asks for {rate} samples per second; only {low} to {high} are possible."
        )
    return rate


def _step(steps: Steps, name: str) -> Mapping[str, Any]:
    found = [step for step in steps if step.get("step") == name]
    if len(found) != 1:
        raise ExportError(f"The manifest's preprocess has {len(found)} steps '{name}', not one.")
    return found[0]
