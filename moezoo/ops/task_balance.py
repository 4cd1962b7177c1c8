"""Which tasks use which experts, as losses: pure functions of a `Routing` and each token's task.

float32 with finite gradients, also for balanced and collapsed routing and for no token at all. The
table of tasks and experts is linear in the tokens, so that steps and devices may add theirs up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.balance import choice_counts
from moezoo.ops.routing import Routing, top_k


def task_expert_sums(routing: Routing, task_N: Array, tasks: int, smoothing: float = 0.0) -> Array:
    """Sum of each expert's probability over each task's tokens, float32 [J, E].

    `smoothing` is added to every probability.
    """
    real_N1 = routing.mask_N[:, None]
    of_task_NJ = ((task_N[:, None] == jnp.arange(tasks)) & real_N1).astype(jnp.float32)
    probs_NE = jnp.where(real_N1, routing.probs_NE + smoothing, 0.0)
    return jnp.einsum("nj,ne->je", of_task_NJ, probs_NE, precision=jax.lax.Precision.HIGHEST)


def mutual_information(sums_JE: Array) -> Array:
    """I(task; expert) in nats of a table of sums; 0 for an empty one.

    With equally many tokens per task it is H(expert) - H(expert | task): even use of the experts
    over all tasks, few experts within one. Mod-Squad (arXiv:2212.08066, eq. 3-5).
    """
    total = jnp.sum(sums_JE)
    joint_JE = sums_JE / jnp.where(total > 0, total, 1.0)
    task_J1 = jnp.sum(joint_JE, axis=1, keepdims=True)
    expert_1E = jnp.sum(joint_JE, axis=0, keepdims=True)
    return _negentropy(joint_JE) - _negentropy(task_J1) - _negentropy(expert_1E)


def _negentropy(p: Array) -> Array:
    """Sum of p log p, 0 where p is 0, with gradient 0 there."""
    some = p > 0
    return jnp.sum(jnp.where(some, p * jnp.log(jnp.where(some, p, 1.0)), 0.0))


def mutual_information_loss(routing: Routing, task_N: Array, tasks: int) -> Array:
    """- I(task; expert): each task to few experts, all experts used."""
    return -mutual_information(task_expert_sums(routing, task_N, tasks))


def mutual_information_loss_smoothed(
    routing: Routing, task_N: Array, tasks: int, smoothing: float = 1e-4
) -> Array:
    """`mutual_information_loss` as Mod-Squad's code has it, with `smoothing` in five places.

    It is added to every probability, to the number of tokens, to both margins and inside the
    logarithm; the joint table then adds up to 1 + E * `smoothing`.
    """
    sums_JE = task_expert_sums(routing, task_N, tasks, smoothing)
    tokens = jnp.sum(choice_counts(routing)) / routing.experts_NK.shape[-1]
    joint_JE = sums_JE / (tokens + smoothing)
    task_J1 = jnp.sum(joint_JE, axis=1, keepdims=True) + smoothing
    expert_1E = jnp.sum(joint_JE, axis=0, keepdims=True) + smoothing
    return -jnp.sum(joint_JE * jnp.log(joint_JE / task_J1 / expert_1E + smoothing))


def few_experts_loss(
    routing: Routing, task_N: Array, tasks: int, free: int, smoothing: float = 0.0
) -> Array:
    """Squared use of all but the `free` most used experts, whose use costs nothing.

    An expert's use is the sum over tasks of its mean probability (plus `smoothing`, 1e-4 in
    Mod-Squad's code, where this is the top-k loss).
    """
    sums_JE = task_expert_sums(routing, task_N, tasks, smoothing)
    here_NJ = (task_N[:, None] == jnp.arange(tasks)) & routing.mask_N[:, None]
    use_E = jnp.sum(sums_JE / jnp.maximum(jnp.sum(here_NJ, axis=0), 1)[:, None], axis=0)
    free_K = top_k(use_E[None], min(free, use_E.shape[0]))[0]
    costs_E = ~jnp.any(free_K[:, None] == jnp.arange(use_E.shape[0]), axis=0)
    return jnp.sum(jnp.where(costs_E, use_E**2, 0.0))
