"""DeepSeek's routers: experts in groups of which a token sees a few, chosen by score plus bias.

DeepSeek-V2 (arXiv:2405.04434, section 2.2.2) lets a token choose among the experts of its best
groups only, so that it goes to few devices. DeepSeek-V3 (arXiv:2412.19437, eq. 12-16) scores by
sigmoids and adds a bias to the choice, which has kept experts busy in its training and weighs
nothing (arXiv:2408.15664).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.layers import Init, normal
from moezoo.nn.routers import LinearRouter
from moezoo.ops.routing import Routing, Select, route
from moezoo.ops.selection import OUTSIDE, Choose, Selection, best_groups, scaled, top_k


class ExpertGroups(NamedTuple):
    """`count` groups of neighbouring experts, of which a token sees the `kept` best; the score of a
    group is the sum of its `best` best experts' scores."""

    count: int = 1
    kept: int = 1
    best: int = 1


@dataclass(frozen=True)
class GroupRouting:
    """How scores become a choice: the k best of `score(logits)`, inside the best groups.

    factor: what the weights of `base`, whose choice is not asked, are multiplied by.
    """

    base: Selection
    score: Callable[[Array], Array]
    groups: ExpertGroups = ExpertGroups()
    factor: float = 1.0

    def selection(self, bias_E: Array | None) -> Selection:
        """The same as a `Select`, with a bias on the choice."""
        weigh = scaled(self.base.weigh, self.factor)
        return Selection(weigh, self._choose(bias_E), self.base.probs)

    def _choose(self, bias_E: Array | None) -> Choose:
        def choose(logits_NE: Array, k: int) -> Array:
            scores_NE = self.score(logits_NE)
            scores_NE = scores_NE if bias_E is None else scores_NE + bias_E
            # What a token may not choose has a score of 0, to which a bias may add.
            scores_NE = jnp.where(logits_NE > OUTSIDE / 2, scores_NE, -jnp.inf)
            return top_k(jnp.where(best_groups(scores_NE, *self.groups), scores_NE, -jnp.inf), k)

        return choose


class GroupRouter(LinearRouter):
    """A linear router by `GroupRouting`; kernel [D, E], and bias [E] where the choice has one.

    The bias is a parameter because it belongs to the weights; the choice has no gradient, so no
    optimiser moves it.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        routing: GroupRouting,
        *,
        biased: bool,
        init: Init = normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(width, experts, k, select=routing.base, init=init, rngs=rngs)
        self.routing = routing
        self.bias = nnx.Param(jnp.zeros((experts,))) if biased else None

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        return self.routing.selection(None if self.bias is None else self.bias.get_value())

    def among(self, routing: Routing, kept: Sequence[int]) -> Routing:
        """As `TopKRouter`; raises UserError where experts stand in groups, which would tear."""
        if self.routing.groups.count > 1:
            raise UserError(
                f"This router's experts stand in {self.routing.groups.count} groups of equal size, "
                "which removing some would tear: keep all of them."
            )
        kept_K = jnp.asarray(kept, jnp.int32)
        bias_K = None if self.bias is None else self.bias.get_value()[kept_K]
        select = self.routing.selection(bias_K)
        logits_NE = routing.logits_NE[:, kept_K]
        return route(logits_NE, k=self.k, select=select, mask_N=routing.mask_N)

    def restricted(self, routing: Routing, kept_E: Array) -> Routing:
        """As `TopKRouter`, where experts stand in no groups."""
        select = self.routing.selection(None if self.bias is None else self.bias.get_value())
        return route(
            routing.logits_NE, k=self.k, select=select, mask_N=routing.mask_N, support_NE=kept_E
        )
