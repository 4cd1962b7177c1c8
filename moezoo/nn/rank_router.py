"""The routers of single ranks: a sigmoid score and a bias that keeps all ranks busy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax import Array

from moezoo.nn.layers import Init, fan_in_uniform
from moezoo.nn.sampling import BalancedRouter
from moezoo.ops.routing import Select
from moezoo.ops.selection import (
    Selection,
    Weigh,
    biased,
    biased_weights_renormalised,
    sigmoid_share,
    sigmoid_weights,
    sigmoid_weights_renormalised,
    softmax,
    softmax_of_chosen,
)

# bias_E -> how chosen experts are weighed
Gate = Callable[[Array], Weigh]


def _same(logits_NE: Array) -> Array:
    return logits_NE


def _shares(bias_E: Array) -> Weigh:
    return sigmoid_weights_renormalised


def _scores(bias_E: Array) -> Weigh:
    return sigmoid_weights


def _softmax(bias_E: Array) -> Weigh:
    return softmax_of_chosen


# What a gate is made of: how the bias enters the weights, the score it is added to, and what the
# losses see.
GATES = {
    "published": (biased_weights_renormalised, jax.nn.sigmoid, sigmoid_share),
    "unbiased": (_shares, jax.nn.sigmoid, sigmoid_share),
    "score": (_scores, jax.nn.sigmoid, sigmoid_share),
    "softmax": (_softmax, _same, softmax),
}


class RankRouter(BalancedRouter):
    """k of E rank experts per token, balanced by a bias instead of by a loss.

    `gate` names how they are weighed: "published", the sigmoids plus biases over their sum, as in
    SMoRA's code (arXiv:2501.15103); "unbiased", the bias only decides, as in the paper that
    introduced it (arXiv:2408.15664); "softmax" over the chosen logits, as summaries of SMoRA's
    paper have it; "score", the bare sigmoids, which train the router even where k is 1. kernel
    [D, E], bias [E] among the statistics; `rate` moves it once per training step.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        gate: str = "published",
        rate: float = 1e-5,
        init: Init | None = None,
        rngs: nnx.Rngs,
    ):
        self.gate, score, probs = GATES[gate]
        init = init or partial(fan_in_uniform, fan_in=width)
        super().__init__(
            width, experts, k, rate=rate, score=score, probs=probs, init=init, rngs=rngs
        )

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        bias_E = self.bias.get_value()
        return Selection(self.gate(bias_E), biased(bias_E, self.score), self.probs)
