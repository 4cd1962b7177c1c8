"""Variations of clips' features: pure functions (example, rng) -> example.

They work on normalised features (`audio` float32 [T, F], of which the first `frames` belong to the
clip) and never change their input. Masks are SpecAugment's (Park et al., Interspeech
2019, arXiv:1904.08779) in the form AST uses (arXiv:2104.01778, section 3.1); noise and shifts in
time are AST's own for Speech Commands; shifts stay inside the clip, while AST also moves padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moezoo.data.source import SourceExample, Transform
from moezoo.errors import unknown

Size = tuple[int, int]


@dataclass(frozen=True)
class Strength:
    """Upper limits on how far examples are varied."""

    freq_mask: int = 24  # bands
    time_mask: int = 80  # frames
    noise: float = 0.1  # in units of normalised features
    roll: int = 10  # frames


def _hide(
    example: SourceExample, rng: np.random.Generator, widest: int, axis: int
) -> SourceExample:
    audio_TF = example["audio"].copy()
    width = rng.random() * min(widest, audio_TF.shape[axis])
    start = int(rng.random() * (audio_TF.shape[axis] - width))
    hidden = slice(start, start + int(width))
    audio_TF[(hidden, slice(None)) if axis == 0 else (slice(None), hidden)] = 0
    return example | {"audio": audio_TF}


def freq_mask(
    example: SourceExample, rng: np.random.Generator, strength: Strength
) -> SourceExample:
    """Some neighbouring bands become 0, the mean of AudioSet."""
    return _hide(example, rng, strength.freq_mask, 1)


def time_mask(
    example: SourceExample, rng: np.random.Generator, strength: Strength
) -> SourceExample:
    """Some neighbouring frames become 0."""
    return _hide(example, rng, strength.time_mask, 0)


def noise(example: SourceExample, rng: np.random.Generator, strength: Strength) -> SourceExample:
    """Uniform noise of a random level is added to every value."""
    level = rng.random() * strength.noise
    audio_TF = example["audio"]
    hiss = rng.random(audio_TF.shape, np.float32)
    return example | {"audio": audio_TF + np.float32(level) * hiss}


def roll(example: SourceExample, rng: np.random.Generator, strength: Strength) -> SourceExample:
    """The clip's own frames move in time; what leaves at one end comes in at the other."""
    by = int(rng.integers(-strength.roll, strength.roll + 1))
    audio_TF, own = example["audio"].copy(), int(example["frames"])
    audio_TF[:own] = np.roll(audio_TF[:own], by, axis=0)
    return example | {"audio": audio_TF}


AUGMENTATIONS: dict[str, Callable[..., SourceExample]] = {
    "freq_mask": freq_mask,
    "time_mask": time_mask,
    "noise": noise,
    "roll": roll,
}


def named(name: str, strength: Strength) -> Transform:
    """The augmentation with this name; UserError for an unknown one."""
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, sorted(AUGMENTATIONS))
    return partial(AUGMENTATIONS[name], strength=strength)


def sequence(names: Sequence[str], strength: Strength) -> list[Transform]:
    """The named augmentations in order."""
    return [named(name, strength) for name in names]
