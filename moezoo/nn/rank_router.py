"""The routers of single ranks: a sigmoid score and a bias that keeps all ranks busy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax import Array

from moezoo.errors import UserError, unknown
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
    unweighted,
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


def _ones(bias_E: Array) -> Weigh:
    return unweighted


# What a gate is made of: how the bias enters the weights, the score it is added to, and what the
# losses see.
GATES = {
    "published": (biased_weights_renormalised, jax.nn.sigmoid, sigmoid_share),
    "unbiased": (_shares, jax.nn.sigmoid, sigmoid_share),
    "score": (_scores, jax.nn.sigmoid, sigmoid_share),
    "softmax": (_softmax, _same, softmax),
}


# Quirk: every chosen expert weighs 1, which is what "published" comes to for a single one. It
# teaches its router nothing.
QUIRKS = {"unweighted": (_ones, jax.nn.sigmoid, sigmoid_share)}
# Gates whose weights do not add up to 1, so that a single expert's is not always 1.
ALONE = ("score", *QUIRKS)


def gate_for(k: int) -> str:
    """The gate where none is named: the published one, and one that learns where k is 1."""
    return "published" if k > 1 else "score"


def check_gate(gate: str, k: int, said: str = "One expert is at work for a token") -> None:
    """Raise UserError for an unknown gate, and for one that would never teach the router.

    said: how the options that make k what it is are called where they were given.
    """
    if gate not in GATES | QUIRKS:
        raise unknown("gate", gate, list(GATES))
    if k == 1 and gate not in ALONE:
        raise UserError(
            f"{said} and gate is {gate}: weights that add up to 1 make that of a single expert 1 "
            "whatever its score, so its router would never learn; take gate score, or 2 experts "
            "or more for each token."
        )


class RankRouter(BalancedRouter):
    """k of E rank experts per token, balanced by a bias instead of by a loss.

    `gate` names how they are weighed: "published", the sigmoids plus biases over their sum, as in
    SMoRA's code (arXiv:2501.15103); "unbiased", the bias only decides, as in the paper that
    introduced it (arXiv:2408.15664); "softmax" over the chosen logits, as summaries of SMoRA's
    paper have it; "score", the bare sigmoids. The others' weights add up to 1, which would teach
    nothing where k is 1: there only "score" is taken, and the quirk "unweighted". None: `gate_for`
    k. kernel [D, E], bias [E] among the statistics; `rate` moves it once per training step. Raises
    UserError for an unknown gate and for one that would not learn.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        gate: str | None = None,
        rate: float = 1e-5,
        init: Init | None = None,
        rngs: nnx.Rngs,
    ):
        gate = gate or gate_for(k)
        check_gate(gate, k)
        self.gate, score, probs = (GATES | QUIRKS)[gate]
        init = init or partial(fan_in_uniform, fan_in=width)
        super().__init__(
            width, experts, k, rate=rate, score=score, probs=probs, init=init, rngs=rngs
        )

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        bias_E = self.bias.get_value()
        return Selection(self.gate(bias_E), biased(bias_E, self.score), self.probs)
