"""Banks of skills that a table of tasks mixes: Polytropon, multi-head routing (`ops.skills`)."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.nn.condition_routers import ConditionRouter, TaskTableRouter
from moezoo.nn.context import Context
from moezoo.nn.exploration import QUIET, Explore
from moezoo.nn.lowrank import LowRank
from moezoo.nn.routers import Decision, Router
from moezoo.ops.routing import Select, ordered_weights
from moezoo.ops.selection import Selected, sigmoid_share
from moezoo.ops.skills import SHARES, by_head, logistic_noise, shares_by_head


def relaxed(select: Select, logits_NE: Array, key: Array) -> Select:
    """What `select` makes of relaxed Bernoulli samples (`Explored`)."""

    def sampled(logits_NE: Array, k: int) -> Selected:
        return select(logistic_noise(logits_NE, key), k)

    return sampled


EXPLORED: dict[str, Explore] = {"none": QUIET, "relaxed": Explore(select=relaxed)}


def nearly_even(key: Array, shape: tuple[int, ...]) -> Array:
    """Between -0.001 and 0.001: all skills begin with nearly equal shares, as published."""
    return jax.random.uniform(key, shape, jnp.float32, -1e-3, 1e-3)


class SkillTableRouter(TaskTableRouter):
    """Shares of E skills for each of S heads, by the task; kernel [J, S * E].

    A task that the table lacks gets equal logits, so equal shares. pace: logits are the kernel
    times it, which under Adam is a learning rate so many times higher, as the published code gives
    its table. Raises UserError for an unknown kind of shares or noise.
    """

    def __init__(
        self,
        tasks: int,
        skills: int,
        heads: int,
        *,
        shares: str = "sigmoid",
        noise: str = "none",
        pace: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if shares not in SHARES:
            raise unknown("kind of shares", shares, list(SHARES))
        if noise not in EXPLORED:
            raise unknown("noise of a table", noise, list(EXPLORED))
        select = shares_by_head(heads, SHARES[shares])

        def init(key: Array, shape: tuple[int, ...]) -> Array:
            return nearly_even(key, shape) / pace

        gates = heads * skills
        made: dict[str, Any] = {"select": select, "explore": EXPLORED[noise], "init": init}
        super().__init__(tasks, gates, gates, **made, rngs=rngs)
        self.pace = pace

    def rows(self, context: Context, key: Array | None = None) -> Array:
        return self.pace * super().rows(context, key)


class EvenRouter(ConditionRouter):
    """Equal shares of all skills for everybody: MHR-mu, and what a table does not know."""

    decision: ClassVar[Decision] = "constant"
    depends_on_task: ClassVar[bool] = False

    def __init__(self, gates: int, heads: int):
        super().__init__(gates, shares_by_head(heads), QUIET)

    def rows(self, context: Context, key: Array | None = None) -> Array:
        return jnp.zeros((1, self.k), jnp.float32)


def shared_and_own(shared: int) -> Select:
    """Sigmoid shares of the first `shared` modules, and the rest as the logits say; all of them.

    C-Poly (arXiv:2312.03248, section 3): what tasks share is chosen as in Polytropon, what they
    have of their own is weighed by a matrix that begins as the identity.
    """

    def select(logits_NE: Array, k: int) -> Selected:
        common_NE = sigmoid_share(logits_NE[:, :shared])
        weights_NE = jnp.concatenate([common_NE, logits_NE[:, shared:]], axis=1)
        experts_NE = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), logits_NE.shape)
        size_NE = jnp.abs(weights_NE)
        return Selected(experts_NE, weights_NE, size_NE / size_NE.sum(-1, keepdims=True))

    return select


def relaxed_shared(shared: int) -> Explore:
    """Training samples the first `shared` logits (Gumbel-sigmoid at temperature 1)."""

    def sampled(select: Select, logits_NE: Array, key: Array) -> Select:
        def chosen(logits_NE: Array, k: int) -> Selected:
            noisy_NE = logistic_noise(logits_NE[:, :shared], key)
            return select(jnp.concatenate([noisy_NE, logits_NE[:, shared:]], axis=1), k)

        return chosen

    return Explore(select=sampled)


class SharedAndOwnRouter(TaskTableRouter):
    """A row per task: logits of modules that tasks share, weights of all tasks' own; [J, A + J B].

    A task that the table lacks shares evenly and has nothing of its own.
    """

    def __init__(self, tasks: int, shared: int, own: int, pace: float, *, rngs: nnx.Rngs):
        def init(key: Array, shape: tuple[int, ...]) -> Array:
            identity_JG = jnp.repeat(jnp.eye(tasks), own, axis=1) / pace
            return jnp.concatenate([nearly_even(key, (tasks, shared)) / pace, identity_JG], axis=1)

        modules = shared + tasks * own
        made: dict[str, Any] = {"select": shared_and_own(shared), "init": init}
        made["explore"] = relaxed_shared(shared)
        super().__init__(tasks, modules, modules, **made, rngs=rngs)
        self.pace = pace

    def rows(self, context: Context, key: Array | None = None) -> Array:
        return self.pace * super().rows(context, key)


def skill_mixture(
    inputs: int,
    outputs: int,
    rank: int,
    *,
    tasks: int,
    skills: int,
    heads: int = 1,
    alpha: float,
    shares: str = "sigmoid",
    noise: str = "none",
    pace: float = 1.0,
    router: Router | None = None,
    rngs: nnx.Rngs,
    **options: Any,
) -> LowRank:
    """E LoRAs of `rank`, their factors mixed by the task's shares, scale alpha / rank.

    router: in the place of a table, one with S * E gates, all given in their order (`EvenRouter`).
    Raises UserError where heads do not divide inputs and outputs, and for fewer than 2 skills.
    """
    if skills < 2:
        raise UserError(f"{skills} skill leaves a table nothing to choose: take 2 or more.")
    if inputs % heads or outputs % heads:
        raise UserError(
            f"{heads} heads do not divide a layer of {inputs} inputs and {outputs} outputs: take a "
            "number that divides all adapted layers."
        )
    told: dict[str, Any] = {"shares": shares, "noise": noise, "pace": pace}
    if router is None:
        router = SkillTableRouter(tasks, skills, heads, **told, rngs=rngs)
    made: dict[str, Any] = {"experts": skills, "heads": heads, "router": router}
    made |= {"scale": alpha / rank, "combine": partial(by_head, heads=heads)}
    made["spread"] = ordered_weights
    return LowRank(inputs, outputs, skills * rank, **made, rngs=rngs, **options)
