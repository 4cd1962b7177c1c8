"""Routers that never look at a token: its task or its attributes decide, for all that share them.

Conditional MoE (Zhu et al., Uni-Perceiver-MoE, arXiv:2206.04674), levels "task" and "attribute". A
modality is an attribute or a task of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.context import Context
from moezoo.nn.exploration import QUIET, Explore
from moezoo.nn.layers import Init, LayerNorm, Linear, trunc_normal
from moezoo.nn.routers import Decision
from moezoo.ops.exact import exact_product
from moezoo.ops.routing import Routing, Select, map_rows, only, route
from moezoo.ops.selection import check_learns, renormalised_among


class ConditionRouter(nnx.Module):
    """One decision per row of a condition, for all tokens of that row; kinds fill in `rows`.

    Noise is drawn once per row: tokens of a row are never told apart. Raises UserError for a
    selection that could teach it nothing.
    """

    decision: ClassVar[Decision] = "task"
    depends_on_task: ClassVar[bool] = True

    def __init__(self, k: int, select: Select, explore: Explore):
        check_learns(select, k)
        self.k, self.select, self.explore = k, select, explore

    def rows(self, context: Context, key: Array | None = None) -> Array:
        """Logits of the condition's rows before noise, float32 [R, E]."""
        raise NotImplementedError

    def decide(self, context: Context, key: Array | None = None) -> Routing:
        """The decision of each row, as if it were one token."""
        logits_RE = self.rows(context, key)
        select = self.explore.select_for(self.select, logits_RE, key)
        return route(logits_RE, k=self.k, select=select, noise=self.explore.noise, key=key)

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        routing = _for_tokens(self.decide(context, key), x_ND.shape[0])
        return routing if mask_N is None else only(routing, mask_N)


class TaskTableRouter(ConditionRouter):
    """A row of logits per task; kernel [J, E]. Which task a row has comes with `task_B`.

    select: by default `selection.renormalised_among` k.
    """

    def __init__(
        self,
        tasks: int,
        experts: int,
        k: int,
        *,
        select: Select | None = None,
        explore: Explore = QUIET,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(k, select or renormalised_among(k), explore)
        self.kernel = nnx.Param(init(rngs.params(), (tasks, experts)))

    def rows(self, context: Context, key: Array | None = None) -> Array:
        task_B = jnp.atleast_1d(jnp.asarray(context.task_B, jnp.int32))
        # A product, not a row of the table: exploration may disturb what the table sees.
        hot_BJ = jax.nn.one_hot(task_B, self.kernel.shape[0])
        return exact_product(self.explore.seen(hot_BJ, key), self.kernel.get_value())


def as_it_is(x: Array) -> Array:
    """No activation."""
    return x


class AttributeRouter(ConditionRouter):
    """Attributes through a linear map and a LayerNorm, then the router's matrix; kernel [F, E].

    Combinations that training never had still get a decision, made of what is known of their
    attributes. `activation` stands between the map and the norm (the paper's code has none by
    default, GELU as an option), `select` is by default `selection.renormalised_among` k.
    Uni-Perceiver-MoE (arXiv:2206.04674), its released form. Raises UserError for rows of another
    length than it was made for.
    """

    def __init__(
        self,
        attributes: int,
        features: int,
        experts: int,
        k: int,
        *,
        activation: Callable[[Array], Array] = as_it_is,
        select: Select | None = None,
        explore: Explore = QUIET,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(k, select or renormalised_among(k), explore)
        self.embed = Linear(attributes, features, init=init, rngs=rngs)
        self.norm = LayerNorm(features, epsilon=1e-5)  # PyTorch's, as published
        self.kernel = nnx.Param(init(rngs.params(), (features, experts)))
        self.activation = activation

    def features(self, attributes_RA: Array) -> Array:
        """What the matrix sees, float32 [R, F]."""
        attributes_RA = attributes_RA.astype(jnp.float32)
        # Not `self.embed(...)`: that product is not exact on accelerators.
        embedded_RF = exact_product(attributes_RA, self.embed.kernel.get_value())
        return self.norm(self.activation(embedded_RF + self.embed.bias.get_value()))

    def rows(self, context: Context, key: Array | None = None) -> Array:
        if context.attributes_RA is None:
            raise ValueError("an AttributeRouter needs context.attributes_RA")
        shape, length = context.attributes_RA.shape, self.embed.kernel.shape[0]
        if len(shape) != 2 or shape[1] != length:
            raise UserError(
                f"The attributes have shape {shape}, but this router was made for rows of "
                f"{length}: give [rows, {length}]."
            )
        features_RF = self.features(context.attributes_RA)
        return exact_product(self.explore.seen(features_RF, key), self.kernel.get_value())


def _for_tokens(rows: Routing, tokens: int) -> Routing:
    """The decisions of R rows for tokens that lie in R equal parts, one part after the other."""
    count = rows.mask_N.shape[0]
    if tokens % count:
        raise ValueError(f"{tokens} tokens do not split into {count} equal rows of a condition")

    def spread(a: Array) -> Array:
        wide = jnp.broadcast_to(a[:, None], (count, tokens // count, *a.shape[1:]))
        return wide.reshape(tokens, *a.shape[1:])

    return map_rows(spread, rows)
