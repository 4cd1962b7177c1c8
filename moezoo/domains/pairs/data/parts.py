"""Tasks on pairs of image and caption: the tasks of Uni-Perceiver-MoE, on rooms.

Zhu et al., "Uni-Perceiver-MoE: Learning Sparse Generalist Models with Conditional MoEs"
(arXiv:2206.04674). Every task is a function of some examples and a random generator; a batch has
one task. Arrays: `image` float32 [B, H, W, 3], `text` int32 [B, T], `label` int32 [B] (index of the
right candidate), `targets` int32 [B, T] (the right word at each place, -1 if none is asked),
`asked` and `there` bool [B, M] (which things a text asks for and an image has).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moezoo.domains.images.data.rooms.names import SCENES
from moezoo.domains.pairs.data import captions
from moezoo.domains.pairs.data.words import END, MASK, PAD, START, Vocabulary

NOTHING = -1
MASKED = 0.15  # share of words that mlm hides

PairBatch = dict[str, np.ndarray]


@dataclass(frozen=True)
class CaptionedImages:
    """Some examples: normalised images [B, H, W, 3], captions, scene numbers [B], their words."""

    image: np.ndarray
    captions: tuple[str, ...]
    scene: np.ndarray
    words: Vocabulary
    length: int  # of texts, in tokens


def scene(pairs: CaptionedImages, rng: np.random.Generator) -> PairBatch:
    """Which kind of room; candidates: `SCENES`."""
    return {"image": pairs.image, "label": pairs.scene.astype(np.int32)}


def caption(pairs: CaptionedImages, rng: np.random.Generator) -> PairBatch:
    """The next word at every place of the caption; candidates: all words."""
    inner = pairs.words.rows(pairs.captions, pairs.length - 1)
    text = np.concatenate([np.full((len(inner), 1), START, np.int32), inner], axis=1)
    targets = np.concatenate([inner, np.full((len(inner), 1), PAD, np.int32)], axis=1)
    ends = (targets != PAD).sum(axis=1)
    targets[np.arange(len(inner)), ends] = END
    return {"image": pairs.image, "text": text, "targets": _asked(targets, targets != PAD)}


def retrieval(pairs: CaptionedImages, rng: np.random.Generator) -> PairBatch:
    """Which caption belongs to which image; candidates: those of the batch."""
    return {"image": pairs.image, "text": pairs.words.rows(pairs.captions, pairs.length)}


def mlm(pairs: CaptionedImages, rng: np.random.Generator) -> PairBatch:
    """Hidden words of the caption, at least one; candidates: all words."""
    text = pairs.words.rows(pairs.captions, pairs.length)
    chance = np.where(text == PAD, 2.0, rng.random(text.shape))
    hidden = (chance < MASKED) | (chance == chance.min(axis=1, keepdims=True))
    return {
        "text": np.where(hidden, MASK, text).astype(np.int32),
        "targets": _asked(text, hidden),
    }


def text_scene(pairs: CaptionedImages, rng: np.random.Generator) -> PairBatch:
    """The kind of room from the things in it; candidates: `SCENES`."""
    texts = [captions.without_scene(c) for c in pairs.captions]
    text = pairs.words.rows(texts, pairs.length)
    return {"text": text, "label": pairs.scene.astype(np.int32)}


def counts(pairs: CaptionedImages, rng: np.random.Generator) -> PairBatch:
    """Which image has what a phrase lists, in these numbers; candidates: those of the batch."""
    said = [captions.read(text) for text in pairs.captions]
    phrases = [s.things[: captions.ASKED] for s in said]
    return {
        "image": pairs.image,
        "text": pairs.words.rows([" and ".join(things) for things in phrases], pairs.length),
        "asked": np.stack([_has(things) for things in phrases]),
        "there": np.stack([_has(s.things) for s in said]),
    }


def _has(things: tuple[str, ...]) -> np.ndarray:
    return np.isin(captions.LISTED, things)


def _asked(values: np.ndarray, where: np.ndarray) -> np.ndarray:
    return np.where(where, values, NOTHING).astype(np.int32)


TASKS: Mapping[str, Callable[[CaptionedImages, np.random.Generator], PairBatch]] = {
    "caption": caption,
    "scene": scene,
    "retrieval": retrieval,
    "text_scene": text_scene,
    "mlm": mlm,
    "counts": counts,
}


def candidates(task: str, words: Vocabulary) -> np.ndarray | None:
    """The texts [C, T] that a task chooses from, int32; None: the texts of its batch."""
    if task in ("scene", "text_scene"):
        return words.rows(SCENES)
    if task in ("caption", "mlm"):
        return np.arange(len(words), dtype=np.int32)[:, None]
    return None
