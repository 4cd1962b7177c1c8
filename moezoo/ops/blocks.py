"""Dropless experts: choices grouped by expert, each group in blocks of rows.

The same plan runs as a loop on CPU and as batched products elsewhere. Without derivatives the
platform that the program is compiled for decides, so one exported program serves several.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops import block_batch, block_loop
from moezoo.ops.dispatch import Sorted, sort_by_expert
from moezoo.ops.expert import Applied, ExpertFn, Params, count_experts, nothing
from moezoo.ops.platform import platform
from moezoo.ops.routing import Routing


def blocks(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Apply the chosen experts to every token; exact, static shapes, nothing dropped.

    Reverse-mode derivatives of the first order only; `reference` has all.
    """
    dropped = jnp.zeros((), jnp.int32)
    if x_ND.shape[0] == 0:
        return Applied(nothing(fn, params, x_ND), dropped)
    plan = sort_by_expert(routing.experts_NK, count_experts(params))
    y_ND: Array = _apply(fn, params, x_ND, routing.weights_NK, plan)  # type: ignore[assignment]
    return Applied(y_ND.astype(x_ND.dtype), dropped)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(fn: ExpertFn, params: Params, x_ND: Array, weights_NK: Array, plan: Sorted) -> Array:
    return lax.platform_dependent(
        params,
        x_ND,
        weights_NK,
        plan,
        cpu=lambda *args: block_loop.forward_in_loop(fn, *args, keep=False).y_ND,
        default=lambda *args: block_batch.forward_at_once(fn, *args),
    )


def _forward(fn: ExpertFn, params: Params, x_ND: Array, weights_NK: Array, plan: Sorted):
    # Derivatives are taken where the program runs, so the platform is chosen here and now: what
    # the loop keeps for its derivative, the batched form does not need.
    args = (params, x_ND, weights_NK, plan)
    if platform() == "cpu":
        y_ND, y_RD = block_loop.forward_in_loop(fn, *args, keep=True)
        return y_ND, (*args, y_RD)
    return block_batch.forward_at_once(fn, *args), (*args, None)


def _backward(fn: ExpertFn, saved, dy_ND: Array):
    params, x_ND, weights_NK, plan, y_RD = saved
    if y_RD is not None:
        done = block_loop.backward_in_loop(fn, params, x_ND, weights_NK, plan, y_RD, dy_ND)
        return *done, None

    def run(params: Params, x_ND: Array, weights_NK: Array) -> Array:
        return block_batch.forward_at_once(fn, params, x_ND, weights_NK, plan)

    return *jax.vjp(run, params, x_ND, weights_NK)[1](dy_ND), None


_apply.defvjp(_forward, _backward)
