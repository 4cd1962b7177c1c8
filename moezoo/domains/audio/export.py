"""A classifier of clips as a task path: it takes spectrograms and finds the clips' ends itself.

In training a batch brings the true length of every clip. A path takes one array, and that is
enough: padding is log-mel 0 in all bands of a frame, which no sound gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.data.source import Example, Info
from moezoo.deploy.manifest import Sound
from moezoo.domains.audio.data import clips, fbank
from moezoo.domains.audio.data.config import AudioDataConfig
from moezoo.domains.audio.data.published import PUBLISHED
from moezoo.domains.audio.data.read import first
from moezoo.errors import UserError
from moezoo.models.shared.multitask import Output
from moezoo.models.soft_moa.model import MIXTURES
from moezoo.train.schema import Config

PADDING = float(fbank.normalise(np.zeros(1, np.float32))[0])
STATEMENT = (
    "The path gives the full model's output for one task up to the rounding of float32: other "
    "tasks' adapters, norms and heads, which it never reads, are gone, and a mixture whose gates "
    "are the task's is one adapter. `full_model` says how far they are apart."
)


def frames_of(audio_BTF: Array) -> Array:
    """How many frames of each clip lie before its padding, int32 [B].

    audio_BTF: float32, as `domains.audio.data.fbank.features` makes them.
    """
    sounds_BT = jnp.any(audio_BTF != jnp.float32(PADDING), axis=-1)
    count = jnp.arange(1, audio_BTF.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(sounds_BT, count, 0), axis=1)


class Heard(nnx.Module):
    """A model of sounds (`models.soft_moa.model`) as a function of spectrograms alone."""

    channels: ClassVar[tuple[int, ...]] = ()

    def __init__(self, model: Any):
        self.model, self.tasks = model, tuple(model.tasks)

    def __call__(self, audio_BTF: Array, tasks: Sequence[str] | None = None) -> Output:
        """Logits [B, classes] by task, float32, from normalised log-mel spectrograms."""
        names = None if tasks is None else tuple(tasks)
        return self.model(audio_BTF, frames_B=frames_of(audio_BTF), tasks=names)


def collate(examples: Sequence[Example], tasks: Sequence[str], info: Info) -> dict[str, np.ndarray]:
    """As `clips.collate`; what a path reads is called `image`, whatever it is."""
    made = clips.collate(examples, tasks, info)
    return {"image": made.pop("audio"), **made}


def check(config: Config, *, fewer: bool) -> None:
    """Raise UserError where fewer experts are asked for of a run on sounds."""
    if fewer and isinstance(config.data, AudioDataConfig):
        mixture = getattr(config.model, "update", None) in MIXTURES
        why = "its mixtures ask all of them" if mixture else "it has none"
        raise UserError(
            f"No expert of {config.name} can be removed, because {why}: export the task as it is, "
            "with tools/export.py and without --keep."
        )


def facts(data: AudioDataConfig) -> Sound:
    """How a sound file becomes what the model reads."""
    published = PUBLISHED.get(data.name)
    how = "first" if published is not None and published.mono is first else "average"
    return Sound(data.rate, how)
