"""Sharded experts without drops: every device sees all tokens of its expert group."""

from __future__ import annotations

from jax import Array, lax

from moezoo.ops.expert import Applied, Backend, ExpertFn, Params, count_experts
from moezoo.ops.routing import Routing
from moezoo.ops.visits import EXPERT, as_routing, own_choices


def gathered(local: Backend) -> Backend:
    """Inside a `shard_map`: all_gather the tokens, apply the own experts, psum_scatter the sums.

    Exact whatever the load. Moves and holds the tokens of all P devices of the expert axis, which
    is P / min(K, P) times what has to travel or more: for short axes.
    """

    def apply(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
        size = count_experts(params)
        x_MD = lax.all_gather(x_ND, EXPERT, tiled=True)
        own = own_choices(routing, size)
        y_MD, dropped = local(fn, params, x_MD, as_routing(own, size))
        return Applied(lax.psum_scatter(y_MD, EXPERT, tiled=True), dropped)

    return apply
