"""Banks of skills that a table of tasks mixes: Polytropon, multi-head routing (`ops.skills`)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.nn.condition_routers import TaskTableRouter
from moezoo.nn.context import Context
from moezoo.nn.exploration import QUIET, Explore
from moezoo.nn.lowrank import LowRank
from moezoo.ops.routing import Select
from moezoo.ops.selection import Selected
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
    rngs: nnx.Rngs,
    **options: Any,
) -> LowRank:
    """E LoRAs of `rank`, their factors mixed by the task's shares, scale alpha / rank.

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
    router = SkillTableRouter(tasks, skills, heads, **told, rngs=rngs)
    made: dict[str, Any] = {"experts": skills, "heads": heads, "router": router}
    made |= {"scale": alpha / rank, "combine": partial(by_head, heads=heads)}
    return LowRank(inputs, outputs, skills * rank, **made, rngs=rngs, **options)
