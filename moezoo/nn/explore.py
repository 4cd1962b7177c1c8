"""How training disturbs a router's decision; at evaluation, without a key, nothing happens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
from flax import nnx
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.nn.condition import Condition
from moezoo.nn.layers import Init, trunc_normal
from moezoo.nn.routers import LinearRouter
from moezoo.ops.routing import Noise, Routing, Select, constant_noise, no_noise, softmax_then_top_k
from moezoo.ops.selection import Selection, sampled_after

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
        condition: Condition,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        return super().__call__(self.explore.seen(x_ND, key), condition, key, mask_N)
