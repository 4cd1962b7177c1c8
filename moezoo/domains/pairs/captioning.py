"""A run's captions as a path: an image in, a sentence out, word by word, without moezoo.

The encoder under the caption's condition (`pairs.conditions`: dense, where a condition decides),
and the features of all words, encoded once. The image is read once; then each word is the most
similar one to what stands before it (`conditional_moe.caption`, greedily).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.backbones.generate import Settings
from moezoo.data.source import ArraySource
from moezoo.deploy import task_path
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import TaskPath
from moezoo.deploy.plan import keep_all
from moezoo.deploy.specialise import copy_of, dense_layer, layers_of, whole_mixture
from moezoo.domains.pairs.conditions import specialise
from moezoo.domains.pairs.data.words import END, MARKS, PAD, START, Vocabulary
from moezoo.label import ROWS
from moezoo.models.conditional_moe.caption import caption
from moezoo.models.conditional_moe.model import ConditionalMoE
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn import module, surgery
from moezoo.nn.conditional import RowLevel, TokenLevel
from moezoo.nn.surgery import MixtureSize
from moezoo.tasks.base import Task
from moezoo.tasks.sentence import WrittenWords, sentences

TASK = "caption"
GONE = (
    "the features of all words were encoded once, and other tasks are gone. A sentence is made "
    "greedily. Its similarities are the full model's up to float32 rounding (`full_model` says how "
    "far apart they are), and so are its words, but where two of them are that close."
)


class Captioner(nnx.Module):
    """The full model under the caption's condition, as a function from images to sentences.

    new: words of the longest sentence, its end included.
    """

    def __init__(self, model: ConditionalMoE, task: str, new: int):
        self.model, self.tasks, self.new = model, (task,), new

    def __call__(self, image_BHWC: Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        """Similarities [B, T, V] of every word at every place; images and words are encoded."""
        words_VD = self.model.words(f"{self.tasks[0]}|target")
        return written(self.model, image_BHWC, self.tasks[0], words_VD, self.new)

    def words(self) -> Array:
        """The features of all words, [V, D]."""
        parts = module.split(self.model)

        @jax.jit
        def encoded(params: Any, stats: Any) -> Array:
            model = module.merge(parts.definition, params, stats)
            return model.words(f"{self.tasks[0]}|target")

        return encoded(parts.params, parts.stats)


class CaptionWriter(nnx.Module):
    """What is left of a model that only writes captions.

    model: reads an image and the sentence behind it.   words_VD: the features of all words.
    """

    def __init__(self, model: ConditionalMoE, task: str, words_VD: Array, new: int):
        self.model, self.tasks, self.new = model, (task,), new
        self.words = nnx.Param(words_VD)

    def __call__(self, image_BHWC: Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        """As `Captioner`, whose words are encoded already."""
        return written(self.model, image_BHWC, self.tasks[0], self.words.get_value(), self.new)


def written(
    model: ConditionalMoE, image_BHWC: Array, task: str, words_VD: Array, new: int
) -> MultiTaskOutput:
    """float32 similarities [B, new, V], 0 behind the end of a sentence; no records.

    Routers decide within the loop over words, which nothing is seen of from outside.
    """
    settings = Settings(new, stop=(END,), pad=PAD)
    made = caption(model, image_BHWC, f"{task}|input", words_VD, settings, bos=START)
    return MultiTaskOutput({task: made.logits_BTV.astype(jnp.float32)}, {}, {})


def caption_path(full: Captioner, task: str, reads: InputSpec) -> TaskPath:
    """The path from an image to a sentence; dense if a condition decides."""
    model, condition = full.model, f"{task}|input"
    example = EncoderInputs(reads.batch(1), jax.ShapeDtypeStruct((1, full.new), jnp.int32))
    if surgery.find(model, TokenLevel):
        own = copy_of(model)
        own.only = (condition, tuple(part.kind for part in own.tokens.parts(example)))
        for layer in layers_of(own).values():
            layer.apply = task_path.BACKEND
    else:
        own = specialise(model, condition, example)
    size = model.config.experts, model.config.top_k
    mixtures = {
        path: dense_layer(MixtureSize(level.router.decision, *size))
        for path, level in surgery.find(model, RowLevel).items()
    } | {
        path: whole_mixture(MixtureSize(level.router.decision, *size))
        for path, level in surgery.find(own, TokenLevel).items()
    }
    made = CaptionWriter(own, task, full.words(), full.new)
    whole = task_path.assemble(made, task, reads, keep_all(task, {}), {}, {})
    # The formula is that of an image and candidates, once.
    return replace(whole, mixtures=mixtures, own_count=True)


def sentence_features(full: Captioner, image_BHWC: Array, task: str) -> Array:
    """The vectors [B, 1, D] that the first word is chosen by: where a sentence begins."""
    start_B1 = jnp.full((image_BHWC.shape[0], 1), START, jnp.int32)
    return full.model.encode(EncoderInputs(image_BHWC, start_B1), f"{task}|input").text_BLD


def caption_task(words: Vocabulary) -> Task:
    """Captions as a path writes them: scored word by word with the true one."""
    return sentences(TASK, WrittenWords(words.words, END, len(MARKS)))


def with_captions(source: ArraySource, words: Vocabulary, length: int) -> ArraySource:
    """The images of a source and, as `caption`, its texts as numbers, int32 [length]."""
    rows = words.rows(source.captions, length - 1)
    ends = (rows != PAD).sum(axis=1)
    truth = np.concatenate([rows, np.full((len(rows), 1), PAD, np.int32)], axis=1)
    truth[np.arange(len(rows)), ends] = END
    names = (*source.info.tasks, TASK)
    kinds = {**source.info.kinds, TASK: ROWS}
    info = replace(source.info, tasks=names, kinds=kinds)
    return ArraySource(info, {**source.arrays, TASK: truth}, source.captions)


@dataclass(frozen=True)
class CaptionAnswer:
    """How a model of pairs is asked for captions, as a part of what it answers of an image."""

    new: int

    def of(self, model: ConditionalMoE) -> Captioner:
        """The model as a function of images."""
        return Captioner(model, TASK, self.new)

    path = staticmethod(caption_path)
    features = staticmethod(sentence_features)
    head = "words"  # of a `CaptionWriter`
    gone = GONE
