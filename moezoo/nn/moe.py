"""The one meeting point of routing and dispatch: a router, stacked experts, a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from flax import nnx
from jax import Array

from moezoo.nn.context import NO_TASK, Context, LayerOutput, task_of_tokens
from moezoo.nn.experts import Experts
from moezoo.nn.routers import Router
from moezoo.ops.expert import Applied, Backend, each_choice
from moezoo.ops.routing import Routing

__all__ = ["Context", "MoE", "MoEOutput", "Record"]


class Record(NamedTuple):
    """What one MoE layer did in one pass, for losses and statistics.

    routing: of all N tokens.
    task_N: int32, the task each token was routed for; 0 where tasks share their tokens.
    dropped: int32 scalar, choices that found no room in their expert.
    """

    routing: Routing
    task_N: Array
    dropped: Array


class MoEOutput(NamedTuple):
    """y_ND in the type of the input, and the record of the pass."""

    y_ND: Array
    record: Record


# What follows a router's decision, of any kind of layer: (layer, x, routing, condition).
Mixing = Callable[["MoE", Array, Routing, Context], MoEOutput]


def weigh_and_add(layer: MoE, x: Array, routing: Routing, context: Context) -> MoEOutput:
    """The sum over a token's choices of weight times what the expert gives."""
    applied = layer.combined(x, routing)
    task_N = task_of_tokens(context, routing.mask_N.shape[0])
    return MoEOutput(applied.y_ND, Record(routing, task_N, applied.dropped))


class MoE(nnx.Module):
    """y_n = sum over the token's K choices of weight times expert output.

    `apply` carries tokens to experts and back (`ops.grouped`). The decision of the whole layer is
    that of its router. `mixing` is what follows it; a pruned or an observed layer has another one
    (`deploy.pruned`, `deploy.calibrate`), whatever its kind.
    """

    def __init__(self, router: Router, experts: Experts, apply: Backend):
        self.router, self.experts, self.apply = router, experts, apply
        self.mixing: Mixing = weigh_and_add

    def __call__(
        self,
        x_ND: Array,
        context: Context = NO_TASK,
        key: Array | None = None,
        mask_N: Array | None = None,
        router_input_ND: Array | None = None,
    ) -> MoEOutput:
        """Route and apply.

        x_ND: B rows of T tokens each. key: for routers with noise; none means no noise.
        mask_N: bool, False = padding, which gets 0. router_input_ND: what the router sees where
        that is not what the experts see.
        """
        seen_ND = x_ND if router_input_ND is None else router_input_ND
        return self.mix(x_ND, self.router(seen_ND, context, key, mask_N), context)

    def in_block(
        self, x_BTD: Array, seen_BTD: Array, context: Context, key: Array | None = None
    ) -> LayerOutput:
        """The layer in the place of a block's MLP; `seen_BTD` is what its router looks at."""
        rows = (-1, x_BTD.shape[-1])
        y, record = self(x_BTD.reshape(rows), context, key, None, seen_BTD.reshape(rows))
        return LayerOutput(y.reshape(x_BTD.shape), record)

    def mix(self, x_ND: Array, routing: Routing, context: Context) -> MoEOutput:
        """What follows the router's decision."""
        return self.mixing(self, x_ND, routing, context)

    def combined(self, x_ND: Array, routing: Routing) -> Applied:
        """What the experts give under a routing of all or of some of them, weighted and added."""
        return self.apply(self.experts.fn, self.experts.stacked(), x_ND, routing)

    def outputs(self, x_ND: Array, routing: Routing) -> Array:
        """What each chosen expert gives before the weight, [N, K, D]."""
        return each_choice(self.apply, self.experts.fn, self.experts.stacked(), x_ND, routing).y_ND
