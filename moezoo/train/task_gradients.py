"""Gradients of single tasks made alike, where each step is one task's.

Li et al., "Uni-Perceiver v2" (arXiv:2211.09808), section 3.3, eq. 8, as far as the text tells: a
task's gradient is scaled to length 1 times the task's weight, and what it adds to Adam's moments is
divided by the task's share of the steps, so that moments are those of all tasks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moezoo.tasks.base import Task

Tree = Any
Adapt = Callable[[Tree, Mapping[str, Any]], tuple[Tree, dict[str, float]]]
SHORTEST = 1e-12


def as_is(grads: Tree, batch: Mapping[str, Any]) -> tuple[Tree, dict[str, float]]:
    """The gradients, and nothing to tell the optimiser."""
    return grads, {}


def normalised(tasks: Sequence[Task], shares: Mapping[str, float]) -> Adapt:
    """From gradients and batch to scaled gradients and what `scale_by_shared_adam` is told.

    shares: of the training steps, by task. A batch must hold one task.
    """
    weights = {task.name: task.weight for task in tasks}

    def adapt(grads: Tree, batch: Mapping[str, Any]) -> tuple[Tree, dict[str, float]]:
        (task,) = (name for name in batch if name in shares)
        factor = weights[task] / jnp.maximum(optax.global_norm(grads), SHORTEST)
        scaled = jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads)
        return scaled, {"share": shares[task]}

    return adapt


def scale_by_shared_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` whose update takes `share`, which divides the new terms of the moments.

    With share 1, the default, both are the same.
    """
    plain = optax.scale_by_adam(b1, b2, eps)

    def update(
        updates: Tree, state: Any, params: Tree = None, *, share: float = 1.0, **_: Any
    ) -> tuple[Tree, Any]:
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
