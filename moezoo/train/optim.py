"""Optimisers and learning-rate schedules as the papers use them, as Optax chains.

Also gradients of single tasks made alike, for runs in which every step is one task's: Li et al.,
"Uni-Perceiver v2" (arXiv:2211.09808), section 3.3, eq. 8, as far as the text tells. A task's
gradient is scaled to length 1 times the task's weight, and what it adds to Adam's moments is
divided by the task's share of the steps, so that the moments are those of all tasks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from moezoo import fields
from moezoo.errors import UserError, unknown
from moezoo.fields import Count, NotNegative, Positive, Share, Whole
from moezoo.tasks.base import Task

# Parameters that no matrix multiplication uses: weight decay only shifts them.
UNDECAYED = frozenset({"bias", "scale", "cls_token", "pos_embed", "register_tokens", "offset_bias"})


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser."""

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    """adamw: decay apart from the gradient; adam, sgd: as torch, decay added to the gradient."""
    lr: Positive = 1e-3
    """Highest learning rate."""
    schedule: Literal["poly", "cosine", "constant"] = "cosine"
    """How the learning rate falls to 0 at the last step."""
    warmup: Whole = 0
    """Steps in which the learning rate rises from 0."""
    hold: Count = 1
    """Steps for which the learning rate stays the same; M3ViT's schedule: one epoch."""
    power: NotNegative = 0.9
    """Exponent of the poly schedule."""
    momentum: Share = 0.9
    """Momentum of sgd."""
    b1: Share = 0.9
    """Decay of Adam's mean."""
    b2: Share = 0.999
    """Decay of Adam's mean square."""
    eps: Positive = 1e-8
    """Added to the root of Adam's mean square."""
    weight_decay: NotNegative = 0.0
    """Factor of the parameters."""
    decay: Literal["matrices", "all"] = "matrices"
    """What decays: matrices alone, or norms, biases and embeddings of positions too."""
    clip: Positive | None = None
    """Longest gradient (global L2 norm); None does not clip."""
    split: Literal["with_parameters", "over_data"] = "with_parameters"
    """over_data: devices that hold the same parameters share out their moments, which saves memory
    (ZeRO's first stage); a checkpoint fits either."""


def poly_schedule(
    base: float, total: int, power: float = 0.9, hold: int = 1
) -> Callable[[Any], jax.Array]:
    """Learning rate `base * (1 - t/total)^power`, float32, 0 from step `total` on.

    `t` is the step, rounded down to a multiple of `hold`: with hold = steps per epoch this is
    the schedule that M3ViT sets once per epoch, with hold = 1 that of TaskExpert.
    """

    def schedule(step: Any) -> jax.Array:
        held = jnp.asarray(step) // hold * hold
        # The whole number of steps that are left is exact in float32, 1 - t/total is not.
        return base * (jnp.maximum(total - held, 0) / total) ** power

    return schedule


def cosine_schedule(base: float, total: int, hold: int = 1) -> Callable[[Any], jax.Array]:
    """Learning rate `base * (1 + cos(pi t/total)) / 2`, float32, 0 from step `total` on."""

    def schedule(step: Any) -> jax.Array:
        held = jnp.asarray(step) // hold * hold
        return base * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(held / total, 0.0, 1.0)))

    return schedule


def schedule(config: OptimConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of every step, warm-up first, then the schedule over the rest."""
    rest = max(total_steps - config.warmup, 1)
    kinds: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "poly": lambda: poly_schedule(config.lr, rest, config.power, config.hold),
        "cosine": lambda: cosine_schedule(config.lr, rest, config.hold),
        "constant": lambda: optax.constant_schedule(config.lr),
    }
    if config.schedule not in kinds:
        raise unknown("schedule", config.schedule, list(kinds))
    after = kinds[config.schedule]()

    def with_warmup(step: Any) -> jax.Array:
        step = jnp.asarray(step)
        # Never 0 at the first step: (step + 1) / warmup.
        rising = config.lr * (step + 1) / max(config.warmup, 1)
        return jnp.where(step < config.warmup, rising, after(jnp.maximum(step - config.warmup, 0)))

    return with_warmup


def matrices(params: Any) -> Any:
    """True for every parameter that decays: no norm, bias or learned embedding."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim > 1 and str(getattr(path[-1], "key", path[-1])) not in UNDECAYED

    return jax.tree_util.tree_map_with_path(decays, params)


def build(
    config: OptimConfig,
    total_steps: int,
    scale_by_adam: Callable[..., optax.GradientTransformation] = optax.scale_by_adam,
) -> optax.GradientTransformation:
    """The gradient transformation that a configuration describes.

    `sgd` is torch's: `v = momentum v + (g + decay p)`, `p -= lr v`, v starting at 0. `adam` is
    torch's Adam: the decay joins the gradient before the moments. `clip` acts on the raw
    gradient. The learning rate's step counter is part of the optimiser's state. `scale_by_adam` may
    be another form of Adam's moments.

    Raises UserError for an unknown kind, schedule or choice of what decays.
    """
    masks: dict[str, Any] = {"matrices": matrices, "all": None}
    if config.decay not in masks:
        raise unknown("choice of what decays", config.decay, list(masks))
    decay = optax.add_decayed_weights(config.weight_decay, masks[config.decay])
    adam = scale_by_adam(config.b1, config.b2, config.eps)
    kinds = {
        "adamw": (adam, decay),
        "adam": (decay, adam),
        "sgd": (decay, optax.trace(config.momentum)),
    }
    if config.kind not in kinds:
        raise unknown("optimiser", config.kind, list(kinds))
    # First, on the gradient of the loss alone: decay joins behind it.
    clip = (optax.clip_by_global_norm(config.clip),) if config.clip is not None else ()
    rate = optax.scale_by_learning_rate(schedule(config, total_steps))
    return optax.chain(*clip, *kinds[config.kind], rate)


def only(optimiser: optax.GradientTransformation, free: Any) -> optax.GradientTransformation:
    """`optimiser` for what `free` names; everything else keeps its bits, decay or not.

    `free` has the parameters' structure, with bool arrays that broadcast to them: rows of an array
    may be free while others are not. Gradients of what stays count in no clipping and no moment.
    """

    def masked(tree: Any) -> Any:
        return jax.tree.map(lambda a, f: jnp.where(f, a, jnp.zeros((), a.dtype)), tree, free)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # Before, for clipping and moments; and behind, because decay moves what has no gradient.
        updates, state = optimiser.update(masked(updates), state, params)
        return masked(updates), state

    return optax.GradientTransformation(optimiser.init, update)


def check(config: OptimConfig, total_steps: int) -> None:
    """UserError for numbers that make no optimiser."""
    fields.check(config, "optimiser")
    if config.warmup >= max(total_steps, 1):
        raise UserError(
            f"optimiser.warmup is {config.warmup}; it must be below train.steps ({total_steps}): "
            f"add --optimiser.warmup {total_steps // 10}."
        )


Pytree = Any
Adapt = Callable[[Pytree, Mapping[str, Any]], tuple[Pytree, dict[str, float]]]
SHORTEST = 1e-12  # a gradient of 0 stays 0


def as_is(grads: Pytree, batch: Mapping[str, Any]) -> tuple[Pytree, dict[str, float]]:
    """The gradients, and nothing to tell the optimiser."""
    return grads, {}


def normalised(tasks: Sequence[Task], shares: Mapping[str, float]) -> Adapt:
    """From gradients and batch to scaled gradients and what `scale_by_shared_adam` is told.

    shares: of the training steps, by task. A batch must hold one task.
    """
    weights = {task.name: task.weight for task in tasks}

    def adapt(grads: Pytree, batch: Mapping[str, Any]) -> tuple[Pytree, dict[str, float]]:
        (task,) = (name for name in batch if name in shares)
        factor = weights[task] / jnp.maximum(optax.global_norm(grads), SHORTEST)
        scaled = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        return scaled, {"share": shares[task]}

    return adapt


def scale_by_shared_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` whose update takes `share`, which divides the new terms of the moments.

    With share 1, the default, both are the same.
    """
    # Its state is Optax's own, so that runs with and without shares have the same checkpoints.
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(
        updates: Pytree, state: Any, params: Pytree = None, *, share: float = 1.0, **_: Any
    ) -> tuple[Pytree, Any]:
        count = optax.safe_increment(state.count)
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g / share, state.mu, updates)
        square = jax.tree.map(
            lambda v, g: b2 * v + (1 - b2) * jnp.square(g) / share, state.nu, updates
        )
        moved = jax.tree.map(
            lambda m, v: (m / (1 - b1**count)) / (jnp.sqrt(v / (1 - b2**count)) + eps), mean, square
        )
        return moved, optax.ScaleByAdamState(count, mean, square)

    return optax.GradientTransformationExtraArgs(plain.init, update)
