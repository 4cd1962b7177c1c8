"""Routers over a library of adapters, of which nothing is trained: prototypes, and given shares.

`PrototypeRouter` scores every token against a vector of each adapter (Arrow, arXiv:2405.11157;
PHATGOOSE, arXiv:2402.05859). `SharesRouter` takes each row's shares from the context: what was made
of its prompt (nearest embedding, clusters, the task that is known).
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.condition_routers import ConditionRouter
from moezoo.nn.context import Context
from moezoo.nn.exploration import QUIET
from moezoo.nn.injection import Frozen
from moezoo.nn.lowrank import check_choice
from moezoo.nn.routers import Decision, without_padding
from moezoo.ops.prototypes import ARROW, PrototypeScore
from moezoo.ops.routing import Routing, Select, route
from moezoo.ops.selection import Selected, top_k_then_softmax


def best_or_all(best: int) -> Select:
    """Softmax over the `best` largest logits, all experts in their own order, others 0.

    A token whose logits are all the same resembles nobody more than others: it mixes all evenly,
    where the first of the list would be nobody's choice.
    """

    def select(logits_NE: Array, k: int) -> Selected:
        chosen = top_k_then_softmax(logits_NE, best)
        hot_NKE = chosen.experts_NK[..., None] == jnp.arange(k)
        weights_NE = jnp.sum(jnp.where(hot_NKE, chosen.weights_NK[..., None], 0.0), axis=1)
        same_N1 = logits_NE.max(-1, keepdims=True) == logits_NE.min(-1, keepdims=True)
        weights_NE = jnp.where(same_N1, 1.0 / k, weights_NE)
        experts_NE = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), logits_NE.shape)
        return Selected(experts_NE, weights_NE, jax.nn.softmax(logits_NE, axis=-1))

    return select


class PrototypeRouter(nnx.Module):
    """`best` of E adapters per token, by its likeness to their prototypes; prototypes [E, D].

    Raises UserError where `best` is not between 1 and E.
    """

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = False

    def __init__(self, prototypes_ED: Array, best: int, score: PrototypeScore = ARROW):
        check_choice(best, prototypes_ED.shape[0])
        self.prototypes = Frozen(prototypes_ED)
        self.best, self.score = best, score

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        prototypes_ED = self.prototypes.get_value()
        logits_NE = self.score(without_padding(x_ND, mask_N), prototypes_ED)
        experts = prototypes_ED.shape[0]
        return route(logits_NE, k=experts, select=best_or_all(self.best), mask_N=mask_N)


def as_given(shares_NE: Array, k: int) -> Selected:
    """The shares themselves as weights, all experts in their own order."""
    experts_NE = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), shares_NE.shape)
    size_NE = jnp.abs(shares_NE)
    total_N1 = size_NE.sum(-1, keepdims=True)
    probs_NE = jnp.where(total_N1 > 0, size_NE / jnp.where(total_N1 > 0, total_N1, 1.0), 1.0 / k)
    return Selected(experts_NE, shares_NE, probs_NE)


class SharesRouter(ConditionRouter):
    """Shares [R, E] of E adapters from `context.attributes_RA`, for the tokens of each row.

    Raises UserError for another number of shares than adapters.
    """

    depends_on_task: ClassVar[bool] = False

    def __init__(self, experts: int):
        super().__init__(experts, as_given, QUIET)

    def rows(self, context: Context, key: Array | None = None) -> Array:
        shares_RE = context.attributes_RA
        if shares_RE is None or shares_RE.shape[-1] != self.k:
            given = None if shares_RE is None else shares_RE.shape[-1]
            raise UserError(f"Rows have {given} shares for {self.k} adapters: give one for each.")
        return shares_RE
