"""Exploration: how training disturbs a router's choice while the weights stay clean.

At evaluation, without a key, nothing is disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.nn import surgery
from moezoo.nn.context import Context
from moezoo.nn.layers import Init, trunc_normal
from moezoo.nn.moe import Record
from moezoo.nn.routers import LinearRouter
from moezoo.ops.balance import choice_counts, updated_bias
from moezoo.ops.routing import (
    Noise,
    Routing,
    Select,
    constant_noise,
    draw_lots,
    no_noise,
    softmax_then_top_k,
)
from moezoo.ops.selection import (
    Probs,
    Selection,
    Weigh,
    biased,
    sampled_after,
    sigmoid_share,
    sigmoid_weights,
    sigmoid_weights_renormalised,
    softmax_weights,
)

Disturb = Callable[[Array, Array], Array]  # (what the router's matrix sees, key) -> the same
Explored = Callable[[Select, Array, Array], Select]  # (select, logits, key) -> select


def leave(x_ND: Array, key: Array) -> Array:
    """The router's input as it is."""
    return x_ND


def jitter(x_ND: Array, key: Array, epsilon: float = 1e-2) -> Array:
    """The router's input times numbers in [1 - epsilon, 1 + epsilon]."""
    return x_ND * jax.random.uniform(key, x_ND.shape, x_ND.dtype, 1 - epsilon, 1 + epsilon)


def best(select: Select, logits_NE: Array, key: Array) -> Select:
    """The selection as it is."""
    return select


def drawn(select: Select, logits_NE: Array, key: Array, scale: float = 1.0) -> Select:
    """All k experts are drawn by Gumbel noise, without replacement; weights are not disturbed.

    scale: the temperature of the softmax that they are drawn from.
    """
    if not isinstance(select, Selection):
        raise ValueError(f"experts can be drawn for a Selection, not for {select}")
    return replace(select, choose=sampled_after(0, scale * jax.random.gumbel(key, logits_NE.shape)))


@dataclass(frozen=True)
class Explore:
    """What may be disturbed: the router's input, its logits, the choice."""

    disturb: Disturb = leave
    noise: Noise = no_noise
    select: Explored = best

    def seen(self, x_ND: Array, key: Array | None) -> Array:
        """What the router's matrix sees."""
        # `key` itself is the noise's (`ops.routing.route`), so other draws fold a number in.
        return x_ND if key is None else self.disturb(x_ND, jax.random.fold_in(key, 1))

    def select_for(self, select: Select, logits_NE: Array, key: Array | None) -> Select:
        """How these logits choose."""
        if key is None:
            return select
        return self.select(select, logits_NE, jax.random.fold_in(key, 2))


QUIET = Explore()

# The names of DeepSpeed's gates and of V-MoE's noise, as Uni-Perceiver-MoE's code has them.
POLICIES: tuple[str, ...] = ("none", "vmoe", "rsample", "jitter")


def policy(name: str, std: float = 1.0) -> Explore:
    """The policy called `name`.

    std: the deviation of "vmoe", to be divided by the number of experts, or the factor of the
    Gumbel noise of "rsample".
    Raises UserError for a name that is not in `POLICIES` and for noise below 0.
    """
    if std < 0:
        raise UserError(f"noise_std is {std}; it must be 0 or above.")
    known = {
        "none": QUIET,
        "vmoe": Explore(noise=constant_noise(std)),
        "rsample": Explore(select=partial(drawn, scale=std)),
        "jitter": Explore(disturb=jitter),
    }
    if name not in known:
        raise unknown("noise policy", name, list(known))
    return known[name]


class ExploringRouter(LinearRouter):
    """A linear router on tokens that training disturbs as `explore` says; kernel [D, E]."""

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        select: Select = softmax_then_top_k,
        explore: Explore = QUIET,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            width, experts, k, select=select, noise=explore.noise, init=init, rngs=rngs
        )
        self.explore = explore

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        return self.explore.select_for(self.select, logits_NE, key)

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        return super().__call__(self.explore.seen(x_ND, key), context, key, mask_N)


class SampledRouter(LinearRouter):
    """The `best` experts of a token by its logits, the others of its k drawn by Gumbel noise.

    Weights come from the clean logits. With a key each choice also draws a lot, for capacity that
    is shared out at random (`capacity.by_lot`); without a key the k best are chosen. DeepSpeed's
    gates, as for Z-code M3 (arXiv:2109.10465). Raises UserError where nothing is left to draw.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        best: int,
        weigh: Weigh = softmax_weights,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        if not 0 <= best < k:
            raise UserError(
                f"best is {best}, so that of {k} experts none is drawn: take 0 to {k - 1}."
            )
        super().__init__(width, experts, k, select=Selection(weigh), init=init, rngs=rngs)
        self.best, self.weigh = best, weigh

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        if key is None:
            return self.select
        gumbel_NE = jax.random.gumbel(jax.random.fold_in(key, 1), logits_NE.shape)
        return Selection(self.weigh, sampled_after(self.best, gumbel_NE))

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        routing = super().__call__(x_ND, context, key, mask_N)
        return routing if key is None else draw_lots(routing, jax.random.fold_in(key, 2))


class RouterBias(nnx.Variable):
    """State that a rule moves: no parameter, so no optimiser ever sees it."""


class BalancedRouter(LinearRouter):
    """A linear router whose experts are kept busy by a bias on the choice instead of by a loss.

    Loss-free balancing (arXiv:2408.15664): the k largest of score + bias, weights from the score
    alone (by default its shares among the chosen, and the bare score where k is 1); after a
    training step `observe` moves the bias by `rate`. kernel [D, E], bias [E] among the statistics.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        rate: float = 1e-3,
        score: Callable[[Array], Array] = jax.nn.sigmoid,
        weigh: Weigh | None = None,
        probs: Probs = sigmoid_share,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        # A single share would be 1 whatever the score: nothing to learn.
        weigh = weigh or (sigmoid_weights_renormalised if k > 1 else sigmoid_weights)
        super().__init__(
            width, experts, k, select=Selection(weigh, probs=probs), init=init, rngs=rngs
        )
        self.bias = RouterBias(jnp.zeros((experts,)))
        self.rate, self.score, self.weigh, self.probs = rate, score, weigh, probs

    def selection(self, bias_E: Array) -> Select:
        """How tokens choose among experts that have these biases."""
        return Selection(self.weigh, biased(bias_E, self.score), self.probs)

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        return self.selection(self.bias.get_value())

    def select_among(self, kept: Sequence[int]) -> Select:
        return self.selection(self.bias.get_value()[jnp.asarray(kept, jnp.int32)])

    def counted(self, routing: Routing, task_N: Array) -> Array:
        """How often each expert was chosen in a pass, int32 [E]."""
        return choice_counts(routing)

    def observe(self, choices_E: Array) -> None:
        """Move the bias by how often each expert was chosen, int32 [E], in a training step."""
        self.bias.set_value(updated_bias(self.bias.get_value(), choices_E, self.rate))


def choices(model: nnx.Module, records: Mapping[str, Record]) -> dict[str, Any]:
    """What routers whose state a rule moves were shown (`TopKRouter.counted`), by their layers.

    Counts of several passes add up; `observe` once per training step takes their sum.
    """
    seen: dict[str, Any] = {}
    for path, record in records.items():
        counted = getattr(getattr(surgery.get(model, path), "router", None), "counted", None)
        found = counted and counted(record.routing, record.task_N)
        if found is not None:
            seen[path] = found
    return seen


def observe(model: nnx.Module, choices: Mapping[str, Any]) -> None:
    """Show every such router what its layer chose; `module.updated_stats` has the new state.

    Outside of `jax.checkpoint` and other inner traces.
    """
    for path, counted in choices.items():
        surgery.get(model, path).router.observe(counted)
