"""Pictures of a run on sounds: spectrograms with what is heard in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moezoo.data.audio import fbank
from moezoo.train.pictures import RIGHT, WRONG, figure_of, save

COLUMNS = 4
TICKS = (100, 300, 1000, 3000)  # Hz


class Answer(NamedTuple):
    """The right class of a task, the likeliest one, and its probability."""

    task: str
    right: str
    given: str
    sure: float


class Clip(NamedTuple):
    """Normalised features [T, F] without padding, and what was asked about them."""

    audio_TF: np.ndarray
    answers: Sequence[Answer]


def predictions(path: Path, clips: Sequence[Clip], rate: int) -> None:
    """Spectrograms; over each, truth and prediction of every task, green where right."""
    columns = min(COLUMNS, len(clips))
    rows = -(-len(clips) // columns)
    lines = len(clips[0].answers)
    size = (3.4 * columns, (1.9 + 0.2 * lines) * rows + 0.3)
    figure, axes = figure_of(rows, columns, size)
    for axis in axes.ravel()[len(clips) :]:
        axis.set_axis_off()
    for number, (axis, clip) in enumerate(zip(axes.ravel(), clips, strict=False)):
        _spectrogram(axis, clip.audio_TF, rate)
        axis.set_title("\n" * lines, fontsize=8)  # room for the answers
        for line, answer in enumerate(reversed(clip.answers)):
            said = f"{answer.task}: {answer.right} → {answer.given} ({100 * answer.sure:.0f} %)"
            colour = RIGHT if answer.right == answer.given else WRONG
            place = {"xy": (0.0, 1.0), "xytext": (0, 4 + 11 * line)}
            axis.annotate(
                said, xycoords="axes fraction", textcoords="offset points", color=colour,
                fontsize=8, **place,
            )  # fmt: skip
        if number % columns == 0:
            axis.set_ylabel("Hz", fontsize=7)
    figure.supxlabel("seconds; right answer → the model's, and how sure it is", fontsize=8)
    save(figure, path)


def _spectrogram(axis, audio_TF: np.ndarray, rate: int) -> None:
    logmel = fbank.denormalise(audio_TF)
    top = float(logmel.max())
    frames, bands = logmel.shape
    # 80 dB below the loudest is silence to an ear.
    axis.imshow(
        logmel.T, origin="lower", aspect="auto", cmap="magma", vmin=top - 8 * np.log(10), vmax=top,
        extent=(0, frames * fbank.HOP, 0, bands),
    )  # fmt: skip
    places = np.interp(TICKS, fbank.centres(bands, rate), np.arange(bands) + 0.5)
    shown = [(place, hertz) for place, hertz in zip(places, TICKS, strict=True) if hertz < rate / 2]
    axis.set_yticks([place for place, _ in shown], [str(hertz) for _, hertz in shown])
    axis.tick_params(labelsize=6)
