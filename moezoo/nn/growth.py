"""Routers that learn a further task: the old tasks keep their router, with its very numbers."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.condition import Condition, task_of_tokens
from moezoo.nn.router import Decision, Router, TopKRouter
from moezoo.ops.routing import OUTSIDE, Routing


def widened(routing: Routing, experts: int) -> Routing:
    """The same decision over `experts` experts, of which those that are more are out of reach."""
    n, before = routing.logits_NE.shape
    more = ((0, 0), (0, experts - before))
    scale_NE = jnp.broadcast_to(routing.noise_scale_NE, (n, before))
    return routing._replace(
        probs_NE=jnp.pad(routing.probs_NE, more),
        logits_NE=jnp.pad(routing.logits_NE, more, constant_values=OUTSIDE),
        noisy_NE=jnp.pad(routing.noisy_NE, more, constant_values=OUTSIDE),
        noise_scale_NE=jnp.pad(scale_NE, more),
    )


class WidenedRouter(nnx.Module):
    """A router of fewer experts than its layer has: the first ones."""

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = False

    def __init__(self, router: TopKRouter, experts: int):
        self.router, self.experts, self.k = router, experts, router.k

    def __call__(
        self,
        x_ND: Array,
        condition: Condition,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        return widened(self.router(x_ND, condition, key, mask_N), self.experts)


class GrownRouter(nnx.Module):
    """The router `old` of the first `tasks` tasks, over the first experts, and `new` for one more.

    An old task is routed by the old computation, whatever the number of experts now; the new task
    may choose among all of them. Where rows of several tasks come together both are computed.
    """

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = True

    def __init__(self, old: Router, new: TopKRouter, *, tasks: int, experts: int):
        self.old, self.new, self.tasks, self.experts, self.k = old, new, tasks, experts, new.k

    def __call__(
        self,
        x_ND: Array,
        condition: Condition,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        task_B = condition.task_B
        if isinstance(task_B, int):
            if task_B >= self.tasks:
                return self.new(x_ND, condition, key, mask_N)
            return widened(self.old(x_ND, condition, key, mask_N), self.experts)
        known = condition._replace(task_B=jnp.minimum(task_B, self.tasks - 1))
        old = widened(self.old(x_ND, known, key, mask_N), self.experts)
        new = widened(self.new(x_ND, condition, key, mask_N), self.experts)
        here_N = task_of_tokens(condition, x_ND.shape[0]) >= self.tasks

        def chosen(of_old: Array, of_new: Array) -> Array:
            here = here_N.reshape(-1, *(1,) * (of_old.ndim - 1))
            return jnp.where(here, of_new, of_old)

        return jax.tree.map(chosen, old, new)

    def of_task(self, task: int) -> Router:
        """The router of one task by itself, sharing no array with this one."""
        if task >= self.tasks:
            return nnx.clone(self.new)
        alone = self.old.of_task(task)  # type: ignore[attr-defined]
        return WidenedRouter(alone, self.experts)
