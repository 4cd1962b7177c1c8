"""A split as a list of clips with labels, and what a source of their features looks like."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moezoo.data.source import ArraySource, Info, Labels, SourceExample
from moezoo.domains.audio.data import fbank
from moezoo.domains.images.data.dense.names import voc_palette
from moezoo.label import IMAGE


class ClipForm(NamedTuple):
    """The form of a clip: frames and mel bands of features at this rate."""

    frames: int
    mel: int
    rate: int = fbank.RATE


@dataclass(frozen=True)
class Listing:
    """The clips of a split in order, with one class per clip and task.

    `load(clip)` gives a waveform float32 [N] at the rate; `mark` identifies their state on disk, so
    that changed clips get new features.
    """

    name: str
    split: str
    clips: Sequence[Any]
    labels: Mapping[str, Sequence[str]]
    names: Mapping[str, tuple[str, ...]]
    load: Callable[[Any], np.ndarray]
    mark: str

    def numbers(self) -> dict[str, np.ndarray]:
        """The classes as numbers uint8 [N], by task."""
        index = {
            task: {name: i for i, name in enumerate(names)} for task, names in self.names.items()
        }
        return {
            task: np.array([index[task][name] for name in given], np.uint8)
            for task, given in self.labels.items()
        }


def describe(name: str, split: str, form: ClipForm, names: Mapping[str, tuple[str, ...]]) -> Info:
    """What a split contains; the resolution is that of features."""
    labels = {task: Labels(n, voc_palette(len(n) + 1)[1:]) for task, n in names.items()}
    kinds = dict.fromkeys(names, IMAGE)
    return Info(name, split, (form.frames, form.mel), tuple(names), labels, kinds=kinds)


def blank(name: str, form: ClipForm, names: Mapping[str, tuple[str, ...]]) -> ArraySource:
    """One silent clip without labels, for tools that need the form of batches and no data."""
    arrays: dict[str, np.ndarray] = {
        "audio": np.zeros((1, form.frames, form.mel), np.float32),
        "frames": np.full(1, form.frames, np.int32),
    }
    unknown = {task: np.full(1, 255, np.uint8) for task in names}
    return ArraySource(describe(name, "train", form, names), arrays | unknown)


def collate(
    examples: Sequence[SourceExample], tasks: Sequence[str], info: Info
) -> dict[str, np.ndarray]:
    """Stack: `audio` float32 [B, T, F], `frames` int32 [B], labels uint8 [B] of `tasks`."""
    wanted = ("audio", "frames", *tasks)
    return {name: np.stack([np.asarray(e[name]) for e in examples]) for name in wanted}
