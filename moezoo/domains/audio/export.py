"""How tasks on clips are exported: a path takes spectrograms and finds the ends of clips itself.

In training a batch provides the true length of every clip. A path takes one array, and that is
enough: padding is log-mel 0 in all bands of a frame, which no recording produces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.data.source import Source
from moezoo.deploy import splits
from moezoo.deploy.exporter import Subject, head_inputs
from moezoo.deploy.input_spec import InputSpec
from moezoo.domains.audio import runtime
from moezoo.domains.audio.data import clips, decode, fbank, wav
from moezoo.domains.audio.data.published import PUBLISHED
from moezoo.domains.audio.data.read import first
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.train.config import Config
from moezoo.train.domain import Classes
from moezoo.train.setup import Loaded

PADDING = float(fbank.normalise(np.zeros(1, np.float32))[0])
STATEMENT = (
    "The path gives the full model's output for one task up to float32 rounding: other "
    "tasks' adapters, norms and heads, which it never reads, are gone, and a mixture whose gates "
    "depend on the task alone is one adapter. `full_model` says how far apart they are."
)


def frames_of(audio_BTF: Array) -> Array:
    """The number of frames of each clip before its padding, int32 [B].

    audio_BTF: float32, as `domains.audio.data.fbank.features` makes them.
    """
    sounds_BT = jnp.any(audio_BTF != jnp.float32(PADDING), axis=-1)
    count = jnp.arange(1, audio_BTF.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(sounds_BT, count, 0), axis=1)


class ClipClassifier(nnx.Module):
    """A model of clips (`models.soft_moa.model`) as a function of spectrograms alone."""

    def __init__(self, model: Any):
        self.model, self.tasks = model, tuple(model.tasks)

    def __call__(self, audio_BTF: Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        """Logits [B, classes] by task, float32, from normalised log-mel spectrograms."""
        names = None if tasks is None else tuple(tasks)
        return self.model(audio_BTF, frames_B=frames_of(audio_BTF), tasks=names)


def spectrograms(size: tuple[int, int], rate: int, mono: str) -> InputSpec:
    """Normalised log-mel spectrograms [frames, bands], made from recordings of any length.

    rate: samples per second to which recordings are resampled. mono: how several channels become
    one: their `average` or the `first`.
    """
    frames, bands = size
    return InputSpec(
        name="audio",
        unit="clips",
        shape=size,
        layout="frames of 10 ms, mel bands",
        preprocess=(
            {"step": "mono", "how": mono},
            {"step": "resample", "rate": rate},
            {"step": "log_mel", "bands": bands, **fbank.FIXED, "by": "fbank.py"},
            {"step": "pad", "frames": frames, "value": 0.0, "longer": "cut"},
            {"step": "normalise", "mean": fbank.MEAN, "std": 2 * fbank.STD},
        ),
        files={"sound.py": runtime, "fbank.py": fbank, "decode.py": decode, "wav.py": wav},
    )


def mono_of(name: str) -> str:
    """How several channels become one in the data set of this name."""
    published = PUBLISHED.get(name)
    return "first" if published is not None and published.mono is first else "average"


@dataclass(frozen=True)
class ClipExports:
    """A run whose paths read clips (`deploy.exporter.Exporter`)."""

    config: Config

    @property
    def input(self) -> InputSpec:
        data: Any = self.config.data
        return spectrograms((data.frames, data.mel), data.rate, mono_of(data.name))

    def check(self, task: str | None) -> None:
        """Every task can be exported."""

    def open(self, split: str) -> Source:
        return self.config.data.domain.open(self.config, split)

    def identity(self) -> Mapping[str, Any]:
        return splits.identity(self.config.data)

    stack = staticmethod(clips.collate)

    def subject(self, run: Loaded, classes: Classes) -> Subject:
        tasks = {task.name: task for task in run.tasks}
        features = partial(head_inputs, where="model/heads")
        return Subject(
            ClipClassifier(run.model),
            tasks,
            statements=dict.fromkeys(tasks, STATEMENT),
            features=features,
            head="model/heads/{}".format,
        )

    def picture(self, example: np.ndarray) -> np.ndarray:
        return runtime.spectrogram(example)
