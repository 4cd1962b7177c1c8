"""How a run on pairs is exported as an image classifier, fixed to one condition.

The class of an image is the name that it is most similar to. Under one condition the image encoder
is dense (`pairs.conditions`), and the features of the names, encoded once, are one array: no
router, no experts, no text. If tokens decide, nothing can be merged, and the encoder keeps its
routers and experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.deploy import task_path
from moezoo.deploy.exporter import Subject
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import PathLayer, TaskPath
from moezoo.deploy.plan import keep_all
from moezoo.deploy.specialise import copy_of, dense_layer, layers_of
from moezoo.domains.images.export import PhotoExports
from moezoo.domains.pairs.conditions import specialise
from moezoo.errors import UserError
from moezoo.models.conditional_moe.model import COLDEST, ConditionalMoE
from moezoo.models.conditional_moe.reading import Reading
from moezoo.models.conditional_moe.tokens import IMAGE, EncoderInputs
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn import module, surgery
from moezoo.nn.conditional import RowLevel, TokenLevel
from moezoo.nn.routers import EXACT
from moezoo.nn.surgery import MixtureSize
from moezoo.ops import soft
from moezoo.tasks import classification
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


def image_features(
    full: ConditionedClassifier, image_BHWC: Array, tasks: Sequence[str]
) -> dict[str, Array]:
    """By task the vector [B, D] of an image that is compared with the names'."""
    inputs = EncoderInputs(image_BHWC)
    return {task: full.model.encode(inputs, f"{task}|input").whole_BD for task in tasks}


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


def statement_of(level: str) -> str:
    """What a certificate says about a path of a model whose routing is decided at this level."""
    return STATEMENTS.get(level, MERGED)


@dataclass(frozen=True)
class ImageChoiceExports(PhotoExports):
    """A run on pairs, which can export only its one task that classifies images.

    data: the images of its pairs.   reading: how its model reads a batch.
    """

    reading: Reading

    def check(self, task: str | None) -> None:
        """Raise UserError for other tasks."""
        config = self.config
        if task not in (None, TASK):
            raise UserError(
                f"Task {task} of {config.name} cannot be exported: an export takes an image and "
                f"gives its class, and in a run on pairs only --task {TASK} does that."
            )
        if TASK not in config.tasks:
            raise UserError(
                f"{config.name} has no task {TASK}, the only one in a run on pairs that can be "
                "exported: an image in, its class out."
            )

    def subject(self, run: Loaded, classes: Classes) -> Subject:
        labels = tuple(classes.names[TASK])
        task = classification.whole(TASK, len(labels), names=labels)
        names_CT = self.reading.candidates[TASK]
        return Subject(
            ConditionedClassifier(run.model, TASK, names_CT, self.reading.pad),
            {TASK: task},
            cut=classifier_path,
            title="full model",  # the names of the classes encoded in every call
            statement=statement_of(run.model.config.level),
            counted=False,
            features=image_features,
        )
