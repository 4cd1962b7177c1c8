"""Routers that look at more than a token: other tokens, its place, or another layer's decision."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.context import Context
from moezoo.nn.layers import Init, trunc_normal
from moezoo.nn.routers import Decision, LinearRouter, Router, without_padding
from moezoo.ops import groups
from moezoo.ops.exact import exact_product
from moezoo.ops.groups import in_groups
from moezoo.ops.routing import (
    Noise,
    Routing,
    Select,
    experts_choose,
    no_noise,
    only,
    softmax_then_top_k,
)
from moezoo.ops.selection import check_learns


class ExpertsChooseRouter(nnx.Module):
    """Every expert takes the `slots` tokens of a group that want it most; kernel [D, E].

    group: the tokens of a row, one image for example, which are then looked at together and by
    themselves; None = all there are: the experts of a token depend on the other tokens, padding and
    batch included. Expert choice (arXiv:2202.09368) in V-MoE's form.
    """

    decision: ClassVar[Decision] = "batch"
    depends_on_task: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        experts: int,
        slots: int,
        *,
        group: int | None = None,
        noise: Noise = no_noise,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        if slots < 1:
            raise UserError(f"{slots} slots per expert: every expert must take at least one token.")
        self.kernel = nnx.Param(init(rngs.params(), (width, experts)))
        self.slots, self.group, self.noise = slots, group, noise
        self.decision = "batch" if group is None else "row"  # type: ignore[misc]

    @property
    def k(self) -> int:
        """The most experts that a token can get."""
        return self.kernel.shape[1]

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        logits_NE = exact_product(without_padding(x_ND, mask_N), self.kernel.get_value())
        n = logits_NE.shape[0]
        mask_N = jnp.ones((n,), bool) if mask_N is None else mask_N
        # Drawn here, for all tokens: inside a group every group would draw the same.
        eps_NE = (
            jnp.zeros_like(logits_NE) if key is None else jax.random.normal(key, logits_NE.shape)
        )
        # Zeros are not enough: the routing would name a scale of noise that there was not.
        noise = no_noise if key is None else self.noise

        def choose(logits_NE: Array, eps_NE: Array, mask_N: Array) -> Routing:
            return experts_choose(
                logits_NE, slots=self.slots, noise=noise, eps_NE=eps_NE, mask_N=mask_N
            ).routing

        if self.group is None:
            return choose(logits_NE, eps_NE, mask_N)
        return in_groups(choose, self.group)(logits_NE, eps_NE, mask_N)


class EnsembleRouter(LinearRouter):
    """A linear router for an ensemble: token n belongs to member n mod M, with its own experts.

    Kernel [D, E], member m's block of columns together; k experts of that block per token.
    Efficient ensemble of experts (arXiv:2110.03360); `groups.by_member` for its losses. Raises
    UserError where members have too few experts, or one each, of which there is nothing to choose.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        members: int,
        select: Select = softmax_then_top_k,
        noise: Noise = no_noise,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        groups.check_members(experts, members, k)
        check_learns(select, k, experts // members, f"Each of {members} members has 1 expert")
        super().__init__(width, experts, k, select=select, noise=noise, init=init, rngs=rngs)
        self.members = members

    def support_for(self, logits_NE: Array, context: Context) -> Array | None:
        tokens, experts = logits_NE.shape
        return groups.member_support(tokens, experts, self.members)


class GivenRouter(nnx.Module):
    """The router of a layer that takes `context.routing`, the decision of another one.

    `source` is the router that decided: the layer's decision is of the same kind.
    """

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = False

    def __init__(self, source: Router):
        self.decision = source.decision  # type: ignore[misc]
        self.depends_on_task = source.depends_on_task  # type: ignore[misc]

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        if context.routing is None:
            raise ValueError("a GivenRouter needs context.routing, another layer's decision")
        return context.routing if mask_N is None else only(context.routing, mask_N)
