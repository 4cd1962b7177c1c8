"""All blocks of rows at once, each with its expert's weights: how a GPU runs dropless experts.

Every group is padded to whole blocks and each block carries a copy of its expert's parameters, so
the whole layer is a few batched products. The copies cost memory: blocks times one expert.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.dispatch import Sorted, block_slots, combine, spread
from moezoo.ops.expert import ExpertFn, Params, dense

BLOCK = 128


def forward_at_once(fn: ExpertFn, params: Params, x_ND: Array, weights_NK: Array, plan: Sorted) -> Array:
    """Apply the experts; y_ND in float32 or wider. Differentiable."""
    blocks = block_slots(plan, weights_NK.shape[1], BLOCK)
    own = jax.tree.map(lambda a: take_experts(a, blocks.expert_P), params)
    d = x_ND.shape[1]
    x_PBD = spread(x_ND, blocks.slots).reshape(blocks.expert_P.shape[0], BLOCK, d)
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
