"""How a run on pairs is exported, fixed to one condition: an image in, its class or caption out.

Captions are written by `pairs.captioning`. The class of an image is the name that it is most
similar to. Under one condition the image encoder is dense (`pairs.conditions`), and the features of
the names, encoded once, are one array: no router, no experts, no text. If tokens decide, nothing
can be merged, and the encoder keeps its routers and experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.data.source import Source
from moezoo.deploy import task_path
from moezoo.deploy.exporter import Subject
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import PathLayer, TaskPath
from moezoo.deploy.plan import keep_all
from moezoo.deploy.specialise import copy_of, dense_layer, layers_of
from moezoo.domains.images.export import PhotoExports
from moezoo.domains.pairs import captioning
from moezoo.domains.pairs.captioning import CaptionAnswer
from moezoo.domains.pairs.conditions import specialise
from moezoo.domains.pairs.data import captions
from moezoo.domains.pairs.data.words import Vocabulary
from moezoo.errors import UserError
from moezoo.models.conditional_moe.model import COLDEST, ConditionalMoE
from moezoo.models.conditional_moe.reading import Reading, joined
from moezoo.models.conditional_moe.tokens import IMAGE, EncoderInputs
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn import module, surgery
from moezoo.nn.conditional import RowLevel, TokenLevel
from moezoo.nn.routers import EXACT
from moezoo.nn.surgery import MixtureSize
from moezoo.ops import soft
from moezoo.tasks import classification
from moezoo.tasks.base import Task
from moezoo.train.domain import Classes
from moezoo.train.setup import Loaded

TASK = "scene"  # an image in, one of a fixed set of classes out
TOKENS_DECIDE = ("token", "context")
GONE = (
    "the names of the classes were encoded once, and texts and other tasks are gone. The output is "
    "the full model's up to float32 rounding; `full_model` says how far apart they are."
)
MERGED = "One condition fixes every mixture, so each was merged into one dense matrix; " + GONE
KEPT = "Tokens decide, so the routers and all experts of the encoder stay; " + GONE
PLAIN = "The model has no experts; " + GONE
STATEMENTS = {"dense": PLAIN} | dict.fromkeys(TOKENS_DECIDE, KEPT)


class ConditionedClassifier(nnx.Module):
    """The full model under one task's condition, as in training, as a classifier of images.

    names_CT: int [C, T], the candidates; pad: the token that fills up their rows.
    """

    def __init__(self, model: ConditionalMoE, task: str, names_CT: Any, pad: int):
        self.model, self.tasks, self.pad = model, (task,), pad
        # Plain numbers, because definitions of modules are compared.
        self.names = tuple(tuple(map(int, row)) for row in np.asarray(names_CT))

    @property
    def reading(self) -> Reading:
        """How the model reads a batch."""
        return Reading({self.tasks[0]: np.asarray(self.names, np.int32)}, self.pad)

    def __call__(self, image_BHWC: Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        """Logits [B, C] under the task's name; images and names are encoded."""
        # A part with a label is read as a choice, whatever the label is.
        part: Any = {"image": image_BHWC, "label": ()}
        return self.reading(self.model, {self.tasks[0]: part})

    def candidates(self) -> Array:
        """The features of the names, float32 [C, D]."""
        parts, reading, side = module.split(self.model), self.reading, f"{self.tasks[0]}|target"

        @jax.jit
        def encoded(params: Any, stats: Any, names_CT: Array) -> Array:
            model = module.merge(parts.definition, params, stats)
            read = model.encode(reading.inputs(text=names_CT), side)
            return read.whole_BD.astype(jnp.float32)

        return encoded(parts.params, parts.stats, jnp.asarray(self.names, jnp.int32))


class NearestName(nnx.Module):
    """Which of C names an image is most similar to, under one condition.

    model: encodes images under `task|input`, and nothing else. candidates_CD: the names' features.
    """

    def __init__(self, model: ConditionalMoE, task: str, candidates_CD: Array):
        self.model, self.tasks = model, (task,)
        self.candidates = nnx.Param(soft.unit(candidates_CD))
        temperature = jnp.exp(model.log_temperature.get_value())
        self.temperature = nnx.Param(jnp.maximum(temperature, COLDEST))

    def __call__(self, image_BHWC: Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        """Cosine similarities over the temperature, float32 [B, C], under the task's name."""
        (task,) = self.tasks
        read = self.model.encode(EncoderInputs(image_BHWC), f"{task}|input")
        # Like `ConditionalMoE.scores`, whose second half was computed once.
        known_CD = self.candidates.get_value()
        cosine_BC = jnp.matmul(soft.unit(read.whole_BD), known_CD.T, precision=EXACT)
        return MultiTaskOutput({task: cosine_BC / self.temperature.get_value()}, {}, read.records)


def image_features(full: ConditionedClassifier, image_BHWC: Array, task: str) -> Array:
    """The vector [B, D] of an image that is compared with the names'."""
    return full.model.encode(EncoderInputs(image_BHWC), f"{task}|input").whole_BD


def classifier_path(full: ConditionedClassifier, task: str, reads: InputSpec) -> TaskPath:
    """The path from an image to its similarities with the names.

    Dense if a condition decides; if tokens decide, with the encoder's routers and experts.
    """
    own = encoder_of(full.model, f"{task}|input", reads)
    config = full.model.config
    layers = {
        path: PathLayer(
            level.router.decision, config.experts, tuple(range(config.experts)), config.top_k
        )
        for path, level in surgery.find(own, TokenLevel).items()
    }
    plan = keep_all(task, {path: layer.experts for path, layer in layers.items()})
    made = NearestName(own, task, full.candidates())
    mixtures = {
        path: dense_layer(MixtureSize(level.router.decision, config.experts, config.top_k))
        for path, level in surgery.find(full.model, RowLevel).items()
    }
    return task_path.assemble(made, task, reads, plan, layers, mixtures)


def encoder_of(model: ConditionalMoE, condition: str, reads: InputSpec) -> ConditionalMoE:
    """A copy of the model that encodes images under this condition only."""
    image = EncoderInputs(reads.batch(1))
    if model.config.level in TOKENS_DECIDE:
        own = copy_of(model)
        own.only = (condition, tuple(part.kind for part in own.tokens.parts(image)))
        for layer in layers_of(own).values():
            layer.apply = task_path.BACKEND
    else:
        own = specialise(model, condition, image)
    # A stack that is read anywhere counts as read: the text's row is removed by hand.
    own.tokens.modality.set_value(own.tokens.modality.get_value()[IMAGE : IMAGE + 1])
    return own


def statement_of(level: str, gone: str = GONE) -> str:
    """What a certificate says about a path of a model whose routing is decided at this level.

    gone: of what else became of the model.
    """
    return STATEMENTS.get(level, MERGED).replace(GONE, gone)


@dataclass(frozen=True)
class ChoiceAnswer:
    """How a model of pairs is asked for a class, as a part of what it answers of an image.

    names: of the classes, rows of tokens.   pad: what fills them up.
    """

    names: tuple[tuple[int, ...], ...]
    pad: int

    def of(self, model: ConditionalMoE) -> ConditionedClassifier:
        """The model as a function of images."""
        return ConditionedClassifier(model, TASK, self.names, self.pad)

    path = staticmethod(classifier_path)
    features = staticmethod(image_features)
    head = "candidates"  # of a `NearestName`
    gone = GONE


class ImageAnswers(nnx.Module):
    """The full model as a function of images with several tasks, each under its own condition.

    answers: by task, in order.
    """

    def __init__(self, model: ConditionalMoE, answers: Mapping[str, Any]):
        self.model, self.tasks = model, tuple(answers)
        self.answers = tuple(answers.values())

    def of(self, task: str) -> Any:
        """The model as a function of images to one task's prediction."""
        return self.answers[self.tasks.index(task)].of(self.model)

    def __call__(self, image_BHWC: Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        """The predictions of these tasks (all by default), and the decisions that they took."""
        read = [self.of(task)(image_BHWC) for task in tasks or self.tasks]
        found = {task: logits for one in read for task, logits in one.predictions.items()}
        return MultiTaskOutput(found, {}, joined([one.records for one in read]))

    def path(self, task: str, reads: InputSpec) -> TaskPath:
        """One task's path."""
        return self.answers[self.tasks.index(task)].path(self.of(task), task, reads)

    def features(self, image_BHWC: Array, tasks: Sequence[str]) -> dict[str, Array]:
        """By task what its last layer reads."""
        return {
            task: self.answers[self.tasks.index(task)].features(self.of(task), image_BHWC, task)
            for task in tasks
        }


@dataclass(frozen=True)
class PairExports(PhotoExports):
    """A run on pairs, whose tasks that read an image alone can be exported.

    data: the images of its pairs.   reading: how its model reads a batch.   words: of captions.
    length: places of a text.
    """

    reading: Reading
    words: Vocabulary
    length: int

    def check(self, task: str | None) -> None:
        """Raise UserError for other tasks."""
        config, known = self.config, (TASK, captioning.TASK)
        if task not in (None, *known):
            raise UserError(
                f"Task {task} of {config.name} cannot be exported: an export takes an image alone, "
                f"and in a run on pairs only --task {TASK} (its class) and --task "
                f"{captioning.TASK} (a sentence) do that."
            )
        if not set(known if task is None else (task,)) & set(config.tasks):
            raise UserError(
                f"{config.name} has no task {task or ' or '.join(known)}: in a run on pairs only "
                "tasks that read an image alone can be exported."
            )

    def open(self, split: str) -> Source:
        source = self.config.data.domain.open(self.config, split)
        return captioning.with_captions(source, self.words, self.length)

    def subject(self, run: Loaded, classes: Classes) -> Subject:
        labels, config = tuple(classes.names.get(TASK, ())), self.config
        answers, tasks = dict[str, Any](), dict[str, Task]()
        if TASK in config.tasks:
            names = tuple(tuple(map(int, row)) for row in self.reading.candidates[TASK])
            answers[TASK] = ChoiceAnswer(names, self.reading.pad)
            tasks[TASK] = classification.whole(TASK, len(labels), names=labels)
        if captioning.TASK in config.tasks:
            answers[captioning.TASK] = CaptionAnswer(min(captions.longest() + 1, self.length))
            tasks[captioning.TASK] = captioning.caption_task(self.words)
        level = run.model.config.level
        return Subject(
            ImageAnswers(run.model, answers),
            tasks,
            cut=ImageAnswers.path,
            title="full model",  # the names of the classes encoded in every call
            statements={name: statement_of(level, one.gone) for name, one in answers.items()},
            counted=False,
            features=ImageAnswers.features,
            head=lambda task: answers[task].head,
        )
