"""A dispatcher that says for each token whether a sub-layer computes it (DyT, arXiv:2403.11808)."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.layers import fan_in_uniform
from moezoo.nn.moe import Record
from moezoo.ops.exact import exact_product
from moezoo.ops.routing import Routing
from moezoo.ops.token_skip import TokenChoice, kept, logistic


class TokenDispatcher(nnx.Module):
    """One logit of a token, float32; kernel [D, 1], bias [1]. It begins as PyTorch's layers do."""

    def __init__(self, width: int, *, temperature: float = 5.0, rngs: nnx.Rngs):
        begin = partial(fan_in_uniform, fan_in=width)
        self.kernel = nnx.Param(begin(rngs.params(), (width, 1)))
        self.bias = nnx.Param(begin(rngs.params(), (1,)))
        self.temperature = temperature

    def __call__(self, x_BTD: Array, key: Array | None = None) -> TokenChoice:
        """The choice for every token; noise and temperature act with a key."""
        b, t, d = x_BTD.shape
        product_N1 = exact_product(x_BTD.reshape(b * t, d), self.kernel.get_value())
        logits_BT = (product_N1 + self.bias.get_value()).reshape(b, t)
        if key is None:
            return kept(logits_BT)
        return kept(logits_BT, logistic(key, (b, t)), self.temperature)


def skip_record(found: TokenChoice) -> Record:
    """The choice as every statistic reads it: expert 0 is nothing, expert 1 the sub-layer."""
    logit_N = found.logits_BT.reshape(-1)
    logits_NE = jnp.stack([jnp.zeros_like(logit_N), logit_N], axis=-1)
    share_N = found.soft_BT.reshape(-1)
    taken_N1 = (found.keep_BT > 0.5).astype(jnp.int32).reshape(-1, 1)
    probs_NE = jnp.stack([1 - share_N, share_N], axis=-1)
    routing = Routing(
        taken_N1,
        jnp.ones(taken_N1.shape, jnp.float32),
        probs_NE,
        logits_NE,
        logits_NE,
        jnp.zeros_like(logits_NE),
        mask_N=jnp.ones(logit_N.shape, bool),
    )
    return Record(routing, jnp.zeros(logit_N.shape, jnp.int32), jnp.zeros((), jnp.int32))
