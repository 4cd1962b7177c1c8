"""Dropless experts without a grouped kernel: choices sorted by expert, in blocks of equal size.

One plan, two ways to run it. Where no derivative is taken, the platform that a program is compiled
for decides between them, so one exported program serves several.

- In a loop, on a CPU: one expert after the other. A block gathers its tokens and adds its result to
  their sums at once, so no sorted copy of the tokens exists. The derivative runs the same loop and
  recomputes each block, so nothing of size [N*K, F] is kept.
- At once, on a GPU: all blocks in a few batched products. Each block carries a copy of its
  expert's parameters, which costs the memory of one expert per block.

A block that reaches beyond its group repeats the group's last row with weight 0: every computed row
belongs to its expert, and a NaN in a padded token has no way in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.dispatch import Sorted, at, block_slots, combine, sort_by_expert, spread
from moezoo.ops.expert import (
    Applied,
    ExpertFn,
    Params,
    count_experts,
    dense,
    nothing,
    output_width,
    platform,
)
from moezoo.ops.routing import Routing

BLOCK = 128


def forward_at_once(
    fn: ExpertFn, params: Params, x_ND: Array, weights_NK: Array, plan: Sorted
) -> Array:
    """Apply the experts; y_ND in float32 or wider. Differentiable."""
    blocks = block_slots(plan, weights_NK.shape[1], BLOCK)
    own = jax.tree.map(lambda a: take_experts(a, blocks.expert_P), params)
    d = x_ND.shape[1]
    x_PBD = spread(x_ND, blocks.slots).reshape(blocks.expert_P.shape[0], BLOCK, d)
    # Empty slots are computed as well; `combine` never reads them.
    y_PBD = jax.vmap(lambda p, x: fn(p, x, dense))(own, x_PBD)
    return combine(y_PBD.reshape(-1, y_PBD.shape[-1]), weights_NK, blocks.slots)


@jax.custom_vjp
def take_experts(stack: Array, expert_P: Array) -> Array:
    """`stack[expert_P]`; the derivative, a product with one-hot rows, adds in a fixed order."""
    return stack[expert_P]


def _take_forward(stack: Array, expert_P: Array):
    return stack[expert_P], (stack.shape[0], expert_P)


def _take_backward(saved, dblocks: Array):
    experts, expert_P = saved
    one_hot_PE = (expert_P[:, None] == jnp.arange(experts)).astype(dblocks.dtype)
    return jnp.einsum("pe,p...->e...", one_hot_PE, dblocks), None


take_experts.defvjp(_take_forward, _take_backward)


# Rows per block. Large blocks cost the fewest passes over the weight gradients; what is left of a
# group goes through in small ones, or in one more large one where that wastes less than half of it.
LARGEST, SMALL = 512, 32


def large_block(rows: int, experts: int) -> int:
    """Rows of a large block: a power of two that an average group fills."""
    if not isinstance(rows, int):  # a symbolic dimension
        return LARGEST
    large = LARGEST
    while large > SMALL and 1.1 * rows < large * experts:
        large //= 2
    return large


class ExpertBlock(NamedTuple):
    """Rows of one block: `row` in sorted order, its token, and its weight (0 = overhang)."""

    first: Array
    row: Array
    token: Array
    weight: Array


class Forward(NamedTuple):
    """y_ND: sums over choices; y_RD: each sorted row's own output, None where it is not kept."""

    y_ND: Array
    y_RD: Array | None


class Backward(NamedTuple):
    """Derivatives with respect to the parameters, the tokens and the weights."""

    dparams: Params
    dx_ND: Array
    dweights_NK: Array


def _wide(like: Array) -> Any:
    return jnp.promote_types(like.dtype, jnp.float32)


def _for_each_block(
    plan: Sorted,
    weights_NK: Array,
    expert: Array,
    step: Callable[[ExpertBlock, Any], Any],
    carry: Any,
) -> Any:
    """Run `step` on each block of one expert's rows."""
    start, end = at(plan.start_E, expert), at(plan.end_E, expert)
    k = weights_NK.shape[1]
    size = large_block(plan.order.shape[0], plan.end_E.shape[0])

    def run(begin: Array, count: Array, size: int, carry: Any) -> Any:
        def body(i: Array, carry: Any) -> Any:
            first = begin + i * size
            row = first + jnp.arange(size, dtype=jnp.int32)
            choice = at(plan.order, jnp.minimum(row, end - 1))
            weight = at(weights_NK.reshape(-1), choice)
            weight = jnp.where(row < end, weight, 0.0)
            return step(ExpertBlock(first, row, choice // k, weight), carry)

        return lax.fori_loop(0, count, body, carry)

    count = (end - start + (size - 1) // 2) // size
    rest = start + count * size
    carry = run(start, count, size, carry)
    return run(rest, jnp.maximum(end - rest + SMALL - 1, 0) // SMALL, SMALL, carry)


def _for_each_expert(params: Params, step: Callable[[Array, Params, Any], Any], carry: Any) -> Any:
    """Run `step(expert, its parameters, carry)` for every expert."""

    def body(carry: Any, expert_own: tuple[Array, Params]) -> tuple[Any, None]:
        return step(*expert_own, carry), None

    experts = jax.tree.leaves(params)[0].shape[0]
    index_E = jnp.arange(experts, dtype=jnp.int32)
    return lax.scan(body, carry, (index_E, params))[0]


def forward_in_loop(
    fn: ExpertFn, params: Params, x_ND: Array, weights_NK: Array, plan: Sorted, keep: bool
) -> Forward:
    """Apply the experts; `keep` also returns every row's output, for the weights' derivative."""
    rows, d = plan.order.shape[0], output_width(fn, params, x_ND)
    y_ND = jnp.zeros((x_ND.shape[0], d), _wide(x_ND))
    # Room for the last block's overhang: a slice that does not fit would be moved back over other
    # rows. Other overhangs lie in the next expert's rows, which that one's blocks overwrite.
    y_RD = jnp.zeros((rows + LARGEST, d), x_ND.dtype) if keep else None

    def expert_step(expert: Array, own: Params, carry: Any) -> Any:
        def block_step(block: ExpertBlock, carry: Any) -> Any:
            y_ND, y_RD = carry
            y = fn(own, at(x_ND, block.token), dense)
            y_ND = _add_rows(y_ND, block.token, y * block.weight[:, None])
            if y_RD is not None:
                y_RD = lax.dynamic_update_slice_in_dim(y_RD, y.astype(y_RD.dtype), block.first, 0)
            return y_ND, y_RD

        return _for_each_block(plan, weights_NK, expert, block_step, carry)

    return Forward(*_for_each_expert(params, expert_step, (y_ND, y_RD)))


def _add_rows(total_ND: Array, token: Array, rows: Array) -> Array:
    return total_ND.at[token].add(rows.astype(total_ND.dtype), mode="promise_in_bounds")


def backward_in_loop(
    fn: ExpertFn,
    params: Params,
    x_ND: Array,
    weights_NK: Array,
    plan: Sorted,
    y_RD: Array,
    dy_ND: Array,
) -> Backward:
    """Pull `dy_ND` back; `y_RD` is what `forward_in_loop` kept."""
    rows = weights_NK.size

    def expert_step(expert: Array, own: Params, carry: Any) -> Any:
        dparams, *rest = carry
        step = _pull_block(fn, own, x_ND, y_RD, dy_ND)
        # Wide, because many blocks add to it: bfloat16 would lose what late ones bring.
        down = jax.tree.map(lambda a: jnp.zeros(a.shape, _wide(a)), own)
        down, *rest = _for_each_block(plan, weights_NK, expert, step, (down, *rest))
        put = partial(lax.dynamic_update_index_in_dim, index=expert, axis=0)
        return jax.tree.map(lambda a, b: put(a, b.astype(a.dtype)), dparams, down), *rest

    dx_ND = jnp.zeros(x_ND.shape, _wide(x_ND))
    dweight_R = jnp.zeros((rows + LARGEST,), jnp.float32)
    carry = (_room(params, plan), dx_ND, dweight_R)
    dparams, dx_ND, dweight_R = _for_each_expert(params, expert_step, carry)
    # Behind the last group lie its overhang and choices of no expert, which have no derivative.
    dweight_R = jnp.where(jnp.arange(rows) < plan.end_E[-1], dweight_R[:rows], 0.0)
    dweight = jnp.zeros((rows,), weights_NK.dtype)
    dweight = dweight.at[plan.order].set(dweight_R, unique_indices=True)
    return Backward(dparams, dx_ND.astype(x_ND.dtype), dweight.reshape(weights_NK.shape))


def _pull_block(
    fn: ExpertFn, own: Params, x_ND: Array, y_RD: Array, dy_ND: Array
) -> Callable[[ExpertBlock, Any], Any]:
    """The derivative of one block: adds to those of the expert, of the tokens, of the weights."""

    def step(block: ExpertBlock, carry: Any) -> Any:
        down, dx_ND, dweight_R = carry
        dy = at(dy_ND, block.token)
        y = lax.dynamic_slice_in_dim(y_RD, block.first, block.row.shape[0])
        dot = jnp.sum((dy * y).astype(dweight_R.dtype), axis=-1)
        dweight_R = lax.dynamic_update_slice_in_dim(dweight_R, dot, block.first, 0)
        out, pull = jax.vjp(lambda p, x: fn(p, x, dense), own, at(x_ND, block.token))
        more, dx = pull((dy * block.weight[:, None]).astype(out.dtype))
        down = jax.tree.map(lambda a, b: a + b.astype(a.dtype), down, more)
        return down, _add_rows(dx_ND, block.token, dx), dweight_R

    return step


def _room(params: Params, plan: Sorted) -> Params:
    """Room for the parameters' derivatives.

    XLA would make one constant for all leaves of a shape and copy it; a zero that it cannot see
    through, and that differs from leaf to leaf, is written once where it is needed.
    """
    leaves, structure = jax.tree.flatten(params)
    zeros = [jnp.minimum(plan.end_E[i % plan.end_E.shape[0]], 0) for i in range(len(leaves))]
    made = [jnp.full(a.shape, z, a.dtype) for a, z in zip(leaves, zeros, strict=True)]
    return structure.unflatten(made)


def blocks(fn: ExpertFn, params: Params, x_ND: Array, routing: Routing) -> Applied:
    """Apply the chosen experts to every token; exact, static shapes, nothing dropped.

    Reverse-mode derivatives of the first order only; `reference` has all.
    """
    dropped = jnp.zeros((), jnp.int32)
    if x_ND.shape[0] == 0:
        # A block repeats a row where it has too few, so there must be one.
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
        cpu=lambda *args: forward_in_loop(fn, *args, keep=False).y_ND,
        default=lambda *args: forward_at_once(fn, *args),
    )


def _forward(fn: ExpertFn, params: Params, x_ND: Array, weights_NK: Array, plan: Sorted):
    # Derivatives are taken where the program runs, so the platform is chosen here and now: what
    # the loop keeps for its derivative, the batched form does not need.
    args = (params, x_ND, weights_NK, plan)
    if platform() == "cpu":
        y_ND, y_RD = forward_in_loop(fn, *args, keep=True)
        return y_ND, (*args, y_RD)
    return forward_at_once(fn, *args), (*args, None)


def _backward(fn: ExpertFn, saved, dy_ND: Array):
    params, x_ND, weights_NK, plan, y_RD = saved
    if y_RD is not None:
        done = backward_in_loop(fn, params, x_ND, weights_NK, plan, y_RD, dy_ND)
        return *done, None

    # Forward once more: what it keeps for a derivative is of size [N*K, F].
    def run(params: Params, x_ND: Array, weights_NK: Array) -> Array:
        return forward_at_once(fn, params, x_ND, weights_NK, plan)

    return *jax.vjp(run, params, x_ND, weights_NK)[1](dy_ND), None


_apply.defvjp(_forward, _backward)
