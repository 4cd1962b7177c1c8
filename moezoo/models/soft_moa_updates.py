"""What is put into an AST and what of it trains, by the name of the update; quirks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.backbones.ast import Block
from moezoo.errors import UserError
from moezoo.nn.adapted import freeze, inject
from moezoo.nn.adapter_mixtures import (
    BiasedRouter,
    DenseAdapters,
    ExpertAxisRouter,
    SoftAdapters,
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
    double_quick_gelu,
)
from moezoo.nn.condition_routers import TaskTableRouter
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.inserted import ARRANGEMENTS, Inserted, PerTask
from moezoo.nn.layers import LayerNorm, fan_in_uniform, gelu
from moezoo.nn.lowrank import LowRank, lora
from moezoo.nn.soft import SoftRouter, lecun_normal
from moezoo.nn.surgery import find
from moezoo.ops.selection import softmax_of_all

HEAD = ("norm/*", "heads/*")
ATTENTION, FEED_FORWARD = ("attn", "norm1"), ("mlp", "norm2")  # sub-layer, norm in front of it
SITES = {
    "attention": (ATTENTION,),
    "mlp": (FEED_FORWARD,),
    "both": (ATTENTION, FEED_FORWARD),
}
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

# The configuration is a `soft_moa.SoftMoAConfig`, the model a `soft_moa.SoftMoA`.
Make = Callable[[Any, int, nnx.Rngs], nnx.Module]  # (config, number of tasks, rngs) -> adapter


class DoubleAdditionBlock(Block):
    """As published: what stands beside attention is added again behind the MLP."""

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        seen_BTD = self.normed("norm1", x_BTD, context)
        within = context.within("attn")
        added_BTD = apply_linear(self.attn.adapter, seen_BTD, within, "adapter")
        x_BTD = x_BTD + apply_linear(self.attn.base, seen_BTD, within, "base") + added_BTD
        y_BTD = apply_linear(self.mlp, self.normed("norm2", x_BTD, context), context, "mlp")
        return x_BTD + y_BTD + added_BTD


def start_of(config: Any) -> Start:
    """What fresh adapters begin from."""
    quirks = set(config.reference_quirks) & set(STARTS)
    if len(quirks) > 1:
        raise UserError("zero_init and fast_init exclude each other: take one of them.")
    return STARTS[quirks.pop() if quirks else "identity"]


def single(config: Any, tasks: int, rngs: nnx.Rngs) -> nnx.Module:
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


def experts_of(config: Any, rngs: nnx.Rngs) -> Any:
    """The stacked adapters of a mixture."""
    activation = gelu if config.module == "bottleneck" else double_quick_gelu
    options: dict[str, Any] = {"activation": activation, "start": start_of(config)}
    sizes = (config.experts, config.ast.width, config.bottleneck)
    return bottleneck_experts(*sizes, dtype=dtype_of(config), rngs=rngs, **options)


def soft(config: Any, tasks: int, rngs: nnx.Rngs) -> nnx.Module:
    """Soft-MoA."""
    sizes = (config.ast.width, config.experts, config.slots)
    experts = experts_of(config, rngs)
    if "normalise_over_experts" in config.reference_quirks:
        return UnitSoftAdapters(ExpertAxisRouter(*sizes, init=slot_normal, rngs=rngs), experts)
    if config.similarity == "cosine":
        return SoftAdapters(SoftRouter(*sizes, init=lecun_normal, rngs=rngs), experts)
    return SoftAdapters(SoftRouter(*sizes, scale=None, init=slot_normal, rngs=rngs), experts)


def dense(config: Any, tasks: int, rngs: nnx.Rngs) -> nnx.Module:
    """Dense MoA, with gates by token or by task."""
    router: Any
    if config.gates == "task":
        sizes = (tasks, config.experts, config.experts)
        router = TaskTableRouter(*sizes, select=softmax_of_all, rngs=rngs)
    else:
        router = BiasedRouter(config.ast.width, config.experts, rngs=rngs)
    return DenseAdapters(router, experts_of(config, rngs))


def dtype_of(config: Any) -> Any:
    """The type of the computation."""
    return jnp.dtype(config.ast.dtype)


def adapters(config: Any, model: Any, rngs: nnx.Rngs, *, make: Make) -> None:
    """An adapter at every site; it, the norm in front of it and the head train."""
    sites = SITES[config.place]
    trained = [*HEAD, *(f"blocks/*/{norm}/*" for _, norm in sites)]
    for block in model.blocks:
        for layer, norm in sites:
            adapter = own(config, model, lambda: make(config, len(model.tasks), rngs))
            arrange = ARRANGEMENTS[config.insertion]
            setattr(block, layer, Inserted(getattr(block, layer), adapter, arrange))
            setattr(block, norm, own(config, model, partial(new_norm, config)))
    model.norm = own(config, model, partial(new_norm, config))
    freeze(model, trained=[*trained, "*/adapter/*"])


def new_norm(config: Any) -> LayerNorm:
    """A fresh norm of the trunk."""
    return LayerNorm(config.ast.width, config.ast.norm_epsilon)


def own(config: Any, model: Any, make: Callable[[], nnx.Module]) -> nnx.Module:
    """`make()` once for every task where they have their own, else once."""
    if config.sharing == "one":
        return make()
    return PerTask({task: make() for task in model.tasks})


def low_rank(config: Any, model: Any, rngs: nnx.Rngs) -> None:
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


def only(config: Any, model: Any, rngs: nnx.Rngs, *, trained: Sequence[str]) -> None:
    """Nothing new; the head and what fits the patterns train."""
    freeze(model, trained=[*HEAD, *trained])


def probe(config: Any, model: Any, rngs: nnx.Rngs) -> None:
    """The head and the last norm."""
    model.norm = own(config, model, partial(new_norm, config))
    freeze(model, trained=HEAD)


UPDATES: dict[str, Callable[[Any, Any, nnx.Rngs], None]] = {
    "soft_moa": partial(adapters, make=soft),
    "dense_moa": partial(adapters, make=dense),
    "adapter": partial(adapters, make=single),
    "lora": low_rank,
    "bitfit": partial(only, trained=["*/bias"]),
    "linear": probe,
    "full": partial(only, trained=["*"]),
}
