"""Which experts a task may choose from: all of them, until training leaves it the ones it uses.

A router with a support decides by "task_support": a token chooses inside its task's set, and what
lies outside of the set can never be asked for. That is what makes a single task's path exact: the
other experts leave it, and not a bit of its answers changes, whatever the input.

The sets are learned in two stages. First every expert is open, and the router counts which weight
each task gives to each expert (a loss such as the mutual information of tasks and experts,
Mod-Squad, arXiv:2212.08066, makes that uneven). At a training step that is set beforehand each task
keeps the experts that it used most; from there on the router chooses among these. The stages are
ours; supports that are given from the start are M3ViT's code's (`regu_experts_fromtask`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import Whole
from moezoo.nn.context import Context, task_of_tokens
from moezoo.ops.routing import Routing

MEMORY = 0.99  # of a step's usage at the next step: a hundred steps decide


@dataclass(frozen=True)
class SupportConfig:
    """The experts that a task may choose from, frozen at one step of training."""

    experts: Whole = 0
    """Experts of a layer that each task keeps, those it used most; 0: all of them, always."""
    step: Whole = 0
    """The training step from which on a task chooses among these only."""

    def check(self, chosen: int, experts: int, noun: str = "model.experts") -> None:
        """Raise UserError where so many experts cannot be kept, or no step is given.

        chosen, experts: of how many experts a token chooses how many.
        """
        if not self.experts:
            if self.step:
                raise UserError(
                    f"model.support.step is {self.step}, but model.support.experts is 0, so that "
                    "nothing is frozen: set both, or neither."
                )
            return
        if not chosen <= self.experts <= experts:
            raise UserError(
                f"model.support keeps {self.experts} experts; a token chooses {chosen} of {noun} "
                f"{experts}, so it must lie between {chosen} and {experts}."
            )
        if not self.step:
            raise UserError(
                "model.support.step is 0, when no task has used any expert yet: set the training "
                "step after which supports are frozen, half of train.steps for example."
            )

    def check_steps(self, steps: int) -> None:
        """Raise UserError where training ends before supports are frozen."""
        if self.experts and self.step >= steps:
            raise UserError(
                f"model.support.step is {self.step}, but training ends after {steps} steps "
                "(train.steps): supports would never be frozen."
            )

    def make(self, tasks: int, experts: int) -> Support | None:
        """A fresh support of `tasks` tasks for one layer; None where all experts stay open."""
        if not self.experts or self.experts >= experts:
            return None
        return LearnedSupport(tasks, experts, self.experts, self.step)


@dataclass(frozen=True)
class HeadSupportConfig(SupportConfig):
    """The same for models whose attention heads are experts, too."""

    heads: Whole = 0
    """Heads of a layer that each task keeps where they are experts; 0: all of them, always."""

    @property
    def of_heads(self) -> SupportConfig:
        """What it says of layers whose experts are heads."""
        return SupportConfig(self.heads, self.step if self.heads else 0)

    @property
    def of_mlps(self) -> SupportConfig:
        """What it says of layers whose experts are MLPs."""
        return SupportConfig(self.experts, self.step if self.experts else 0)

    def check_steps(self, steps: int) -> None:
        for part in (self.of_heads, self.of_mlps):
            part.check_steps(steps)


class SupportState(nnx.Variable):
    """State that a rule moves: no parameter, so no optimiser ever sees it."""


class Support(nnx.Module):
    """What a router asks: the experts that tokens may choose from."""

    def of(self, context: Context, tokens: int) -> Array:
        """bool [E] or [N, E]; at least one expert per token."""
        raise NotImplementedError

    @property
    def reach(self) -> tuple[int, ...] | None:
        """The only experts that any token can ask for, ascending; None where it can be any."""
        return None

    def counted(self, routing: Routing, task_N: Array) -> Array | None:
        """What one training pass shows of the use of experts; passes of a step add up."""
        return None

    def observe(self, counted: Any) -> None:
        """Move the state by what a training step showed."""

    def of_task(self, task: int) -> FixedSupport:
        """The set of one task by itself."""
        raise NotImplementedError


class LearnedSupport(Support):
    """Sets of J tasks over E experts, among the statistics; see the file's first lines.

    usage [J, E]: the share of a task's weights that each expert had, fading with `MEMORY` per step.
    open [J, E]: 1 where a task may choose an expert, else 0.   seen []: training steps so far.
    """

    def __init__(self, tasks: int, experts: int, keep: int, step: int):
        self.usage = SupportState(jnp.zeros((tasks, experts), jnp.float32))
        self.open = SupportState(jnp.ones((tasks, experts), jnp.float32))
        self.seen = SupportState(jnp.zeros((), jnp.float32))
        self.tasks, self.keep, self.step = tasks, keep, step

    def of(self, context: Context, tokens: int) -> Array:
        open_JE = self.open.get_value() > 0
        if self.tasks == 1:
            # Tasks that share their tokens share the set, whatever number the context says.
            return open_JE[0]
        if jnp.ndim(context.task_B) == 0:
            return open_JE[context.task_B]
        return open_JE[task_of_tokens(context, tokens)]

    def counted(self, routing: Routing, task_N: Array) -> Array:
        """The weight that each task's tokens gave to each expert, float32 [J, E]."""
        e = routing.probs_NE.shape[1]
        number_N = jnp.zeros_like(task_N) if self.tasks == 1 else task_N
        # Where nothing was chosen the weight is 0, so the place in the table does not matter.
        place_NK = number_N[:, None] * e + jnp.maximum(routing.experts_NK, 0)
        weights_NK = jax.lax.stop_gradient(routing.weights_NK)
        places = self.tasks * e
        sums = jax.ops.segment_sum(weights_NK.reshape(-1), place_NK.reshape(-1), places)
        return sums.reshape(self.tasks, e)

    def observe(self, counted: Array) -> None:
        """One training step: remember the use of experts; at `step` close the least used."""
        total_J1 = jnp.sum(counted, axis=1, keepdims=True)
        share_JE = counted / jnp.where(total_J1 > 0, total_J1, 1.0)
        usage_JE = MEMORY * self.usage.get_value() + (1 - MEMORY) * share_JE
        seen = self.seen.get_value() + 1
        # The place of each expert in its task's order; equal shares prefer the lower number.
        place_JE = jnp.argsort(jnp.argsort(-usage_JE, axis=1, stable=True), axis=1, stable=True)
        kept_JE = (place_JE < self.keep).astype(jnp.float32)
        self.open.set_value(jnp.where(seen == self.step, kept_JE, self.open.get_value()))
        self.usage.set_value(usage_JE)
        self.seen.set_value(seen)

    def of_task(self, task: int) -> FixedSupport:
        row = 0 if self.tasks == 1 else task
        return fixed(np.asarray(self.open.get_value())[row] > 0)


class FixedSupport(Support):
    """The set `ids` of one task over E experts, for good."""

    def __init__(self, ids: tuple[int, ...], experts: int):
        self.ids, self.experts = ids, experts

    @property
    def reach(self) -> tuple[int, ...]:
        return self.ids

    def of(self, context: Context, tokens: int) -> Array:
        return jnp.asarray([e in self.ids for e in range(self.experts)])

    def of_task(self, task: int) -> FixedSupport:
        return self


def fixed(open_E: np.ndarray) -> FixedSupport:
    """The experts for which `open_E`, bool, is true."""
    return FixedSupport(tuple(int(e) for e in np.flatnonzero(open_E)), len(open_E))
