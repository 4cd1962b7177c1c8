"""What systems on text share: a decoder of packed rows, and what their configurations answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.decoder import Decoder, DecoderConfig
from moezoo.errors import UserError
from moezoo.fields import Positive, Share, check
from moezoo.models.shared.config import HeldParts, ModelTraits
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn import module
from moezoo.nn.condition_routers import ConditionRouter
from moezoo.nn.context import Context
from moezoo.nn.heads import Hidden
from moezoo.nn.injection import MakeUpdate, freeze, hold, inject
from moezoo.nn.lowrank import LowRank
from moezoo.nn.surgery import MixtureSize

Merging = Literal["alone", "task"]
OwnLosses = Callable[[Mapping[str, Any]], dict[str, Array]]  # of records by path


class LanguageModel(Decoder):
    """A decoder that reads packed rows; its parameters are the decoder's, under the same paths.

    judge: the losses that it asks for besides next tokens, from what its routers did.
    """

    judge: OwnLosses | None = None

    def read(
        self, rows: Mapping[str, Array], *, key: Array | None = None, train: bool
    ) -> MultiTaskOutput:
        """Features of every token, as the prediction of task "lm".

        rows: int32 [B, T] each: `tokens`; `segments`, the document of each token, 0 = padding;
        `positions` in the document; `task` of the document, which routers and statistics see.
        """
        segments_BT = rows["segments"]
        context = Context(
            # By token: a row may hold documents of several tasks.
            rows["task"].reshape(-1),
            mask_BT=segments_BT > 0,
            train=train,
            key=key if train else None,
        )
        x_BTD, _ = self.features(
            rows["tokens"], context, segments_BT=segments_BT, positions_BT=rows["positions"]
        )
        own = self.judge(context.records) if train and self.judge is not None else {}
        features: Any = Hidden(x_BTD, self.head)
        return MultiTaskOutput({"lm": features}, {}, context.records, own)

    @property
    def head(self) -> Array:
        """The matrix [D, V] from features to logits."""
        if self.lm_head is None:
            return self.embed.table.get_value().T
        return self.lm_head.kernel.get_value()


class LanguageTraits(ModelTraits):
    """What a configuration with a `decoder` answers (`ModelTraits`)."""

    reads: ClassVar[str] = "text"
    # Whether the router of an update is a gate by which a library of such updates routes.
    gates_library: ClassVar[bool] = False
    per_pixel: ClassVar[bool] = False
    decoder: DecoderConfig

    def token_choice(self) -> MixtureSize | None:
        """Among how many blocks of an update's ranks a token chooses; None: it has no such update.

        Of the layers that have one, all of which have the same.
        """
        return None

    def merging(self) -> Merging | None:
        """What makes it a plain decoder: "alone" nothing, "task" a task; None: nothing can."""
        return None

    def computes(self) -> dict[str, Any]:
        """What decides, beside their shapes, what parameters compute, by the option's name."""
        return {f"decoder.{name}": value for name, value in self.decoder.computes().items()}

    def check_mesh(self, expert: int) -> None:
        """UserError where the decoder's experts do not split evenly over `expert` devices."""
        count = self.decoder.experts.count
        if count % expert:
            raise UserError(
                f"model.decoder.experts.count is {count}, which does not split evenly over "
                f"mesh.expert={expert} devices."
            )


def left_over(groups: Sequence[str], count: int, said: str) -> str | None:
    """A sentence about the data's tasks beyond the first `count`; None where there are no more."""
    return f"{', '.join(groups[count:])}: {said}." if groups[count:] else None


class StagedTraits(LanguageTraits):
    """What a configuration answers whose adapters learn in a first stage and stand still in the
    second (`stage`), which starts from a run of the first."""

    system: ClassVar[str]
    # The first stage, what it trains, and the configuration of such a run.
    first_stage: ClassVar[str] = "adapters"
    learned: ClassVar[tuple[str, ...]] = ("layers/*/adapters/*",)
    first_run: ClassVar[str]
    stage: Any

    def computes_in(self) -> dict[str, dict[str, Any]]:
        return {"/adapters/": {"the system of its adapters": self.system}}

    def held(self) -> HeldParts | None:
        if self.stage == self.first_stage:
            return None
        return HeldParts(self.learned, "adapters", f"a run of its first stage ({self.first_run})")


def untaught(groups: Sequence[str], count: int) -> str | None:
    """What becomes of tasks of the data beyond the first `count`, which alone have an adapter."""
    return left_over(groups, count, f"no adapter (model.tasks {count}), so they teach nothing")


def check_vocabulary(config: DecoderConfig, tasks: Mapping[str, int]) -> None:
    """Raise UserError where the task is no text, or has ids that the decoder has no row for."""
    wanted: Any = tasks.get("lm")
    if wanted is None or len(tasks) > 1:
        raise UserError("A language model has one task: take --tasks lm.")
    if wanted > config.vocabulary:
        raise UserError(
            f"The tokenizer has {wanted} ids, but the decoder's vocabulary is {config.vocabulary}: "
            "take the model's own tokenizer (data.tokenizer), or a larger model.decoder.vocabulary."
        )


@dataclass(frozen=True)
class AdaptedDecoderConfig(LanguageTraits):
    """A frozen decoder with an update on some of its layers: what all such systems have."""

    learned_by: ClassVar[str] = "a run that has trained them"
    """What a run with parts that stand still starts from."""

    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    alpha: Positive = 16.0
    """Scale of the update: alpha / rank, where the system says no other."""
    dropout: Share = 0.0
    """Share of the update's inputs that are set to 0 in training."""
    targets: tuple[str, ...] = ("layers/*",)
    """The linear layers that get an update, by path; * stands for anything."""
    base_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the frozen arrays; None: the decoder's param_dtype."""

    def __post_init__(self) -> None:
        check(self)
        check_targets(self.targets)

    def make_update(self, inputs: int, outputs: int, rngs: nnx.Rngs) -> LowRank:
        """What is added to a layer of these sizes."""
        raise NotImplementedError

    def example_update(self) -> LowRank:
        """An update with shapes for arrays: what it decides does not depend on a layer's size."""
        width = self.decoder.width
        return module.merge(*module.abstract(lambda: self.make_update(width, width, nnx.Rngs(0))))

    def token_choice(self) -> MixtureSize | None:
        return self.example_update().token_choice

    def merging(self) -> Merging | None:
        router = self.example_update().router
        if router is None:
            return "alone"
        if not isinstance(router, ConditionRouter):
            return None
        return "alone" if router.decision == "constant" else "task"

    def router_computes(self) -> tuple[str, ...]:
        """The options that decide, beside their shapes, what the arrays of its routers compute."""
        return ()

    def computes_in(self) -> dict[str, dict[str, Any]]:
        update = self.example_update()
        factors = {
            "the scale of its updates (model.alpha over a rank)": update.scale,
            "the number of blocks of its ranks": update.experts,
            "model.heads": update.gates // update.experts,
        }
        router = {"the kind of its routers": type(update.router).__name__}
        router |= {f"model.{name}": getattr(self, name) for name in self.router_computes()}
        return {"/update/down": factors, "/update/up": factors, "/update/router/": router}

    def judge(self) -> OwnLosses | None:
        """The losses that a model asks for besides next tokens; None where there are none."""
        return None

    def still(self) -> tuple[str, ...]:
        """Which parts of an update are not trained: of "down", "up" and "router"."""
        return ()

    def held(self) -> HeldParts | None:
        if self.bank() is not None or not self.still():
            return None
        arrays = tuple(f"*/update/{part}*" for part in self.still())
        return HeldParts(arrays, "LoRAs", self.learned_by)

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> LanguageModel:
        """The decoder with its updates; only they, with their routers, are parameters.

        Raises UserError for targets that fit no layer or the head, for sizes that do not fit a
        layer, and as `LanguageConfig.build`.
        """
        check_vocabulary(self.decoder, tasks)

        def make(inputs: int, outputs: int) -> LowRank:
            return self.make_update(inputs, outputs, rngs)

        model = adapted_decoder(self.decoder, self.targets, make, self.base_dtype, rngs)
        hold(model, self.still())
        if (judge := self.judge()) is not None:
            model.judge = judge
        return model


def check_targets(targets: Sequence[str]) -> None:
    """Raise UserError where no layer would be adapted."""
    if not targets:
        raise UserError("targets is empty, so nothing would train: name some, as layers/*.")


def adapted_decoder(
    config: DecoderConfig,
    targets: Sequence[str],
    make: MakeUpdate,
    base_dtype: str | None,
    rngs: nnx.Rngs,
) -> LanguageModel:
    """A frozen decoder with an update on each target; only updates are parameters.

    Raises UserError for targets that fit no layer or the head.
    """
    model = LanguageModel(config, rngs=rngs)
    paths = inject(model, targets, make)
    # Losses take the bare matrix (`LanguageModel.head`): they would miss an update on it.
    if "lm_head" in paths:
        raise UserError("targets names lm_head, which cannot be adapted: take layers/* only.")
    # Last: what the updates have brought is all that stays a parameter.
    freeze(model, base_dtype and jnp.dtype(base_dtype))
    return model
