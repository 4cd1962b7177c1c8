"""Soft-MoA: adapters on a frozen Audio Spectrogram Transformer, mixed softly, and its siblings.

Cappellazzo, Falavigna, Brutti: "Efficient Fine-tuning of Audio Spectrogram Transformers via Soft
Mixture of Adapters", Interspeech 2024, arXiv:2402.00828; single adapters and LoRA as in their
arXiv:2312.03694. What the papers claim, as far as could be read (abstracts, the code's README and
summaries by others; no table): on four benchmarks of sounds and speech Soft-MoA beats the single
adapter and comes close to the dense mixture at a lower cost of training; all experts contribute;
many experts of few slots are best; a conformer adapter reaches full fine-tuning with 0.29 % of its
parameters.

Beside attention or the feed-forward network, on the same normalised tokens, stand E small adapters
of S slots: slots are mixtures of all tokens, tokens mixtures of all slots' outputs (Soft MoE): with
scores z = x W of N tokens and E S slots, y = softmax(z over slots) f(softmax(z over tokens)^T x).
What trains: adapters, the norm in front of them, the last norm, the head on the mean of all tokens.

Where we differ from the published code, whose accidents exist as `reference_quirks`: the output
beside attention is added once ("double_addition": again behind the feed-forward network); positions
of a shorter clip are cut out of the table ("zero_positions": there are none); `similarity` "cosine"
is Soft MoE's ("normalise_over_experts": slots scaled over the wrong axis, experts see scaled
tokens); adapters begin at zero and train ("zero_init": what is written; "fast_init": what
transformers makes of it); Convpass convolves and the conformer normalises
("convpass_double_activation", "conformer_dead_norm"); LoRA's second matrix begins at zero, not the
first ("reversed_lora_init"). Patches of pure padding neither take part in mixtures nor in the mean,
unless `padding` is "seen". Several tasks are ours: adapters of their own, or one set for all.

What we ran, and what came out: README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.ast import (
    AST,
    SPECIAL,
    ASTBlock,
    ASTConfig,
    fitted,
    special_token,
    token_mask,
    zero_elsewhere,
)
from moezoo.errors import UserError, unknown
from moezoo.fields import AxisSize, Positive, check
from moezoo.models.shared import balancing
from moezoo.models.shared.card import Card
from moezoo.models.shared.config import ModelTraits
from moezoo.models.shared.multitask import MultiTaskOutput, check_tasks, wanted
from moezoo.nn.adapter_mixtures import (
    BiasedRouter,
    DenseAdapters,
    ExpertAxisRouter,
    SoftAdapters,
    SoftRecord,
    UnitSoftAdapters,
    slot_normal,
)
from moezoo.nn.adapters import (
    STARTS,
    Bottleneck,
    Conformer,
    Convpass,
    NormlessConformer,
    Start,
    UnusedConvpass,
    bottleneck_experts,
    check_bottleneck,
    double_quick_gelu,
)
from moezoo.nn.attention import mean_token
from moezoo.nn.condition_routers import TaskTableRouter
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.injection import ARRANGEMENTS, Inserted, PerTask, freeze, inject
from moezoo.nn.layers import LayerNorm, Linear, fan_in_uniform, gelu, zeros
from moezoo.nn.lowrank import LowRank, check_ranks, lora
from moezoo.nn.soft import SoftRouter, lecun_normal
from moezoo.nn.surgery import find
from moezoo.ops.selection import check_learns, softmax_of_all

QUIRKS = (
    "double_addition",
    "zero_positions",
    "normalise_over_experts",
    "zero_init",
    "fast_init",
    "convpass_double_activation",
    "conformer_dead_norm",
    "reversed_lora_init",
)
MIXTURES = ("soft_moa", "dense_moa")
# Where tasks that share nothing trained part, by update; others share all but their heads.
PARTS: dict[str, Literal["blocks", "norm"]] = {
    "soft_moa": "blocks",
    "dense_moa": "blocks",
    "adapter": "blocks",
    "linear": "norm",
}
# Of an AST, what shapes do not tell.
COMPUTES = ("heads", "stride_time", "stride_freq", "norm_epsilon")


@dataclass(frozen=True)
class SoftMoAConfig(ModelTraits):
    """An AST and what is trained of it or beside it; the defaults are the published ones."""

    card: ClassVar[Card] = Card(
        title="Soft-MoA, dense mixtures, single adapters, LoRA, BitFit, probe",
        paper="Cappellazzo et al., Interspeech 2024, arXiv:2402.00828",
        kind="small adapters beside a frozen Audio Spectrogram Transformer, mixed softly",
        parity="the published code and transformers",
        fixtures=("soft_moa",),
        trained=("sounds/ast_tiny", "sounds/soft_moa_tiny"),
        headline="accuracy 0.792 ± 0.012 with seven experts, one adapter 0.777 ± 0.003",
    )
    reads: ClassVar[str] = "audio"
    per_pixel: ClassVar[bool] = False

    ast: ASTConfig = field(default_factory=ASTConfig)
    update: Literal["soft_moa", "dense_moa", "adapter", "lora", "bitfit", "linear", "full"] = (
        "soft_moa"
    )
    """What is trained besides head and last norm: a soft or dense mixture of adapters, a single
    one, LoRA on attention, all biases, nothing (a linear probe), or everything."""
    module: Literal["bottleneck", "convpass", "conformer"] = "bottleneck"
    """The kind of adapter; experts of mixtures are bottlenecks."""
    experts: AxisSize = 7
    """Adapters of a mixture."""
    slots: AxisSize = 1
    """soft_moa: mixtures of tokens that an expert sees."""
    bottleneck: AxisSize = 6
    """Hidden units of an adapter; published as the width over a rate of 128."""
    kernel: AxisSize = 31
    """conformer: tokens that its convolution sees."""
    place: Literal["attention", "mlp", "both"] = "attention"
    """The sub-layer with an adapter (Pfeiffer), or both with one each (Houlsby)."""
    insertion: Literal[
        "parallel", "parallel_residual", "sequential", "sequential_residual", "before"
    ] = "parallel"
    """How sub-layer and adapter are put together (`nn.injection`)."""
    similarity: Literal["product", "cosine"] = "product"
    """soft_moa: how slots compare with tokens; cosines have a learned scale."""
    gates: Literal["token", "task"] = "token"
    """dense_moa: who decides; gates by task make a task's path one adapter."""
    ranks: AxisSize = 12
    """lora: the rank."""
    alpha: Positive = 8.0
    """lora: the update is scaled by alpha / ranks."""
    targets: tuple[str, ...] = ("q", "v")
    """lora: the linear layers of attention that get one, of q, k, v and o."""
    sharing: Literal["tasks", "one"] = "tasks"
    """Whether every task has adapters and norms of its own or all have the same; heads are own.
    LoRA, biases and the whole trunk are always shared."""
    pool: Literal["mean", "special"] = "mean"
    """What is classified: the mean of all tokens, or of the two special ones."""
    padding: Literal["masked", "seen"] = "masked"
    """Whether patches of pure padding are left out of mixtures, convolutions and means."""
    reference_quirks: tuple[str, ...] = ()
    """Accidents of the published code to repeat, see `models/soft_moa/model.py`."""

    def __post_init__(self) -> None:
        check(self)
        for quirk in self.reference_quirks:
            if quirk not in QUIRKS:
                raise unknown("reference quirk", quirk, list(QUIRKS))
        self._check_sizes()

    def _check_sizes(self) -> None:
        check_bottleneck(self.bottleneck)
        check_ranks(self.ranks, 1)
        if self.update in MIXTURES and self.module == "conformer":
            raise UserError("Experts of a mixture are bottlenecks: take model.module bottleneck.")
        double = "convpass_double_activation" in self.reference_quirks
        if self.update in MIXTURES and self.module == "convpass" and not double:
            raise UserError(
                "Slots have no order that a convolution could run along: take model.module "
                "bottleneck, or the published convpass, whose convolution does nothing "
                "(reference_quirks convpass_double_activation)."
            )
        if self.gates == "task" and self.update == "dense_moa" and self.sharing == "tasks":
            raise UserError(
                "Gates by task tell tasks apart that share their experts: take model.sharing one."
            )
        if self.update == "dense_moa":
            # Its k is of no account: all experts are chosen.
            check_learns(softmax_of_all, 0, self.experts, f"experts is {self.experts}")
        if not self.targets or not set(self.targets) <= set("qkvo"):
            raise UserError(f"targets is {self.targets}; name some of q, k, v and o.")
        beside = self.place == "attention" and self.insertion == "parallel"
        if "double_addition" in self.reference_quirks and not (self.update in MIXTURES and beside):
            raise UserError(
                "double_addition is an accident of mixtures in parallel to attention: take "
                "model.place attention and model.insertion parallel."
            )

    idle_losses = balancing.nothing_chosen

    def whole(self) -> str:
        """Why no expert can be removed: `models.shared.config.ModelTraits`."""
        return "its mixtures ask all of them" if self.update in MIXTURES else "it has none"

    @property
    def tasks_part(self) -> Literal["blocks", "norm", "heads"]:
        """Where tasks begin to be computed by themselves."""
        if self.update == "dense_moa" and self.gates == "task":
            return "blocks"
        return "heads" if self.sharing == "one" else PARTS.get(self.update, "heads")

    def build(
        self, tasks: Mapping[str, int], image_size: tuple[int, int], rngs: nnx.Rngs
    ) -> SoftMoA:
        """The classifier for `{task name: classes}` of clips of `image_size` (frames, mel bands).

        Raises UserError where sizes do not go together.
        """
        check_tasks(tasks)
        self.check_size(image_size)
        model = SoftMoA(self, tasks, rngs=rngs)
        UPDATES[self.update](self, model, rngs)
        return model

    def computes(self) -> dict[str, Any]:
        """What decides, beside their shapes, what parameters compute, by the option's name."""
        return {f"ast.{name}": getattr(self.ast, name) for name in COMPUTES}

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise UserError where clips of `size` (frames, mel bands) cannot be read."""
        if size[1] != self.ast.mel:
            raise UserError(
                f"Clips have {size[1]} mel bands, but model.ast.mel is {self.ast.mel}: both must "
                "be the same."
            )
        self.ast.grid(size[0])


# (config, number of tasks, rngs) -> what is put beside a sub-layer.
MakeAdapters = Callable[[Any, int, nnx.Rngs], nnx.Module]
HEAD = ("norm/*", "heads/*")
ATTENTION, FEED_FORWARD = ("attn", "norm1"), ("mlp", "norm2")  # sub-layer, norm in front of it
SITES = {
    "attention": (ATTENTION,),
    "mlp": (FEED_FORWARD,),
    "both": (ATTENTION, FEED_FORWARD),
}


def adapters(config: SoftMoAConfig, model: SoftMoA, rngs: nnx.Rngs, *, make: MakeAdapters) -> None:
    """An adapter at every site; it, the norm in front of it and the head train."""
    sites = SITES[config.place]
    trained = [*HEAD, *(f"blocks/*/{norm}/*" for _, norm in sites)]
    for block in model.blocks:
        for layer, norm in sites:
            adapter = own(config, model, lambda: make(config, len(model.tasks), rngs))
            arrange = ARRANGEMENTS[config.insertion]
            setattr(block, layer, Inserted(getattr(block, layer), adapter, arrange))
            # The norm in front trains with the adapter, so it is a task's own where that is.
            setattr(block, norm, own(config, model, partial(new_norm, config)))
    model.norm = own(config, model, partial(new_norm, config))
    freeze(model, trained=[*trained, "*/adapter/*"])


def own(config: SoftMoAConfig, model: SoftMoA, make: Callable[[], nnx.Module]) -> nnx.Module:
    """`make()` once for every task where they have their own, else once."""
    if config.sharing == "one":
        return make()
    return PerTask({task: make() for task in model.tasks})


def new_norm(config: SoftMoAConfig) -> LayerNorm:
    """A fresh norm of the trunk."""
    return LayerNorm(config.ast.width, config.ast.norm_epsilon)


def soft(config: SoftMoAConfig, tasks: int, rngs: nnx.Rngs) -> nnx.Module:
    """Soft-MoA."""
    sizes = (config.ast.width, config.experts, config.slots)
    experts = experts_of(config, rngs)
    if "normalise_over_experts" in config.reference_quirks:
        return UnitSoftAdapters(ExpertAxisRouter(*sizes, init=slot_normal, rngs=rngs), experts)
    if config.similarity == "cosine":
        return SoftAdapters(SoftRouter(*sizes, init=lecun_normal, rngs=rngs), experts)
    return SoftAdapters(SoftRouter(*sizes, scale=None, init=slot_normal, rngs=rngs), experts)


def dense(config: SoftMoAConfig, tasks: int, rngs: nnx.Rngs) -> nnx.Module:
    """Dense MoA, with gates by token or by task."""
    router: Any
    if config.gates == "task":
        sizes = (tasks, config.experts, config.experts)
        router = TaskTableRouter(*sizes, select=softmax_of_all, rngs=rngs)
    else:
        router = BiasedRouter(config.ast.width, config.experts, rngs=rngs)
    return DenseAdapters(router, experts_of(config, rngs))


def single(config: SoftMoAConfig, tasks: int, rngs: nnx.Rngs) -> nnx.Module:
    """One adapter."""
    options: dict[str, Any] = {"start": start_of(config), "dtype": dtype_of(config), "rngs": rngs}
    sizes = (config.ast.width, config.bottleneck)
    if config.module == "convpass":
        unused = "convpass_double_activation" in config.reference_quirks
        return (UnusedConvpass if unused else Convpass)(*sizes, **options)
    if config.module == "conformer":
        dead = "conformer_dead_norm" in config.reference_quirks
        return (NormlessConformer if dead else Conformer)(*sizes, kernel=config.kernel, **options)
    return Bottleneck(*sizes, **options)


def experts_of(config: SoftMoAConfig, rngs: nnx.Rngs) -> Any:
    """The stacked adapters of a mixture."""
    activation = gelu if config.module == "bottleneck" else double_quick_gelu
    options: dict[str, Any] = {"activation": activation, "start": start_of(config)}
    sizes = (config.experts, config.ast.width, config.bottleneck)
    return bottleneck_experts(*sizes, dtype=dtype_of(config), rngs=rngs, **options)


def start_of(config: SoftMoAConfig) -> Start:
    """What fresh adapters begin from."""
    quirks = set(config.reference_quirks) & set(STARTS)
    if len(quirks) > 1:
        raise UserError("zero_init and fast_init exclude each other: take one of them.")
    return STARTS[quirks.pop() if quirks else "identity"]


def dtype_of(config: SoftMoAConfig) -> Any:
    """The type of the computation."""
    return jnp.dtype(config.ast.dtype)


def low_rank(config: SoftMoAConfig, model: SoftMoA, rngs: nnx.Rngs) -> None:
    """LoRA on linear layers of attention."""

    def make(inputs: int, outputs: int) -> LowRank:
        options: dict[str, Any] = {"alpha": config.alpha, "dtype": dtype_of(config), "rngs": rngs}
        return lora(inputs, outputs, config.ranks, **options)

    inject(model, [f"blocks/*/attn/{name}" for name in config.targets], make)
    if "reversed_lora_init" in config.reference_quirks:
        for update in find(model, LowRank).values():
            reverse(update, rngs.params())
    freeze(model, trained=HEAD)


def reverse(update: Any, key: jax.Array) -> None:
    """As published: the first matrix begins with zeros and the second as PyTorch's layers do."""
    ranks = update.up.shape[0]
    update.down.set_value(jnp.zeros(update.down.shape))
    update.up.set_value(fan_in_uniform(key, update.up.shape, fan_in=ranks))


def probe(config: SoftMoAConfig, model: SoftMoA, rngs: nnx.Rngs) -> None:
    """The head and the last norm."""
    model.norm = own(config, model, partial(new_norm, config))
    freeze(model, trained=HEAD)


def only(config: SoftMoAConfig, model: SoftMoA, rngs: nnx.Rngs, *, trained: Sequence[str]) -> None:
    """Nothing new; the head and what fits the patterns train."""
    freeze(model, trained=[*HEAD, *trained])


UPDATES: dict[str, Callable[[SoftMoAConfig, SoftMoA, nnx.Rngs], None]] = {
    "soft_moa": partial(adapters, make=soft),
    "dense_moa": partial(adapters, make=dense),
    "adapter": partial(adapters, make=single),
    "lora": low_rank,
    "bitfit": partial(only, trained=["*/bias"]),
    "linear": probe,
    "full": partial(only, trained=["*"]),
}


class SoftMoA(AST):
    """An AST with a head per task; what else is in it, and what of it trains, says the update."""

    channels: ClassVar[tuple[int, ...]] = ()  # of an example besides frames and mel bands

    def __init__(self, config: SoftMoAConfig, tasks: Mapping[str, int], *, rngs: nnx.Rngs):
        quirks = config.reference_quirks
        fit = zero_elsewhere if "zero_positions" in quirks else fitted
        options: dict[str, Any] = {"fit": fit}
        if "double_addition" in quirks:
            options["make_block"] = DoubleAdditionBlock
        super().__init__(config.ast, rngs=rngs, **options)
        self.options, self.tasks = config, tuple(tasks)
        self.heads = nnx.Dict(
            {
                task: Linear(config.ast.width, classes, init=zeros, rngs=rngs)
                for task, classes in tasks.items()
            }
        )

    @property
    def balance_losses(self) -> Mapping[str, Any]:
        """None: nothing is chosen, so there is nothing to balance."""
        return {}

    def __call__(  # type: ignore[override]
        self,
        audio_BTF: Array,
        *,
        frames_B: Array | None = None,
        tasks: tuple[str, ...] | None = None,
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """Logits [B, classes] of `tasks` (all by default), float32.

        audio_BTF: normalised log-mel spectrograms. frames_B: int32, true frames of each; all where
        it is not given. key: for dropout, in training only.
        """
        names = wanted(self.tasks, tasks)
        ids = tuple(self.tasks.index(name) for name in names)
        part, x_RTD = self.options.tasks_part, self.embed(audio_BTF)
        mask_BT = None
        if frames_B is not None:
            mask_BT = MASKS[self.options.padding](self.config, audio_BTF.shape[1], frames_B)
        b, context = audio_BTF.shape[0], Context(mask_BT=mask_BT, train=train, key=key)
        # Tasks part as late as they can: what comes before runs once for all of them.
        if part == "blocks":
            x_RTD, context = for_tasks(x_RTD, context, ids)
        x_RTD = self.encode(x_RTD, context)
        if part == "norm":
            x_RTD, context = for_tasks(x_RTD, context, ids)
        x_RTD = apply_linear(self.norm, x_RTD, context, "norm")
        x_RD = POOLS[self.options.pool](x_RTD, context.mask_BT).astype(jnp.float32)
        own_BJD = x_RD.reshape(b, -1, x_RD.shape[-1])
        rows = range(len(names)) if context.tasks else [0] * len(names)
        predictions = {n: self.heads[n](own_BJD[:, j]) for n, j in zip(names, rows, strict=True)}
        return MultiTaskOutput(predictions, {}, context.records)


def for_tasks(x_BTD: Array, context: Context, ids: tuple[int, ...]) -> tuple[Array, Context]:
    """Rows b*J + j for the tasks `ids`, and their context; records go where they went."""
    mask_BT = context.mask_BT
    task_B: Array | int = ids[0]
    if len(ids) > 1:
        task_B = jnp.tile(jnp.asarray(ids, jnp.int32), x_BTD.shape[0])
        mask_BT = None if mask_BT is None else _repeated(mask_BT, len(ids))
        x_BTD = _repeated(x_BTD, len(ids))
    return x_BTD, replace(context, task_B=task_B, mask_BT=mask_BT, tasks=ids)


def _repeated(x: Array, count: int) -> Array:
    wide = jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))
    return wide.reshape(-1, *x.shape[1:])


def _everything(config: ASTConfig, frames: int, frames_B: Array) -> None:
    return None


MASKS = {"masked": token_mask, "seen": _everything}
POOLS = {"mean": mean_token, "special": special_token}


class DoubleAdditionBlock(ASTBlock):
    """As published: what stands beside attention is added again behind the MLP."""

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        seen_BTD = self.normed("norm1", x_BTD, context)
        within = context.within("attn")
        # By its parts: `Inserted` gives only the sum, and the adapter's share is needed twice.
        added_BTD = apply_linear(self.attn.adapter, seen_BTD, within, "adapter")
        x_BTD = x_BTD + apply_linear(self.attn.base, seen_BTD, within, "base") + added_BTD
        y_BTD = apply_linear(self.mlp, self.normed("norm2", x_BTD, context), context, "mlp")
        return x_BTD + y_BTD + added_BTD


def slot_maps(
    output: MultiTaskOutput, config: ASTConfig, frames: int
) -> dict[str, tuple[Array, Array]]:
    """Dispatch and combine weights of every soft mixture over time and frequency, by its path.

    Each [B, E, S, F, T], float32; the special tokens' weights are left out. B counts the rows of
    tasks that have their own, all of the first task before those of the second.
    """
    rows, columns = config.grid(frames)

    def on_grid(weights_BTES: Array) -> Array:
        patches = weights_BTES[:, SPECIAL:]
        maps = patches.reshape(patches.shape[0], rows, columns, *patches.shape[2:])
        return jnp.moveaxis(maps, (1, 2), (3, 4))

    return {
        path: (on_grid(record.mixing.dispatch_BTES), on_grid(record.mixing.combine_BTES))
        for path, record in output.records.items()
        if isinstance(record, SoftRecord)
    }
