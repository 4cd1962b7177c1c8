"""Low-rank updates: plain LoRA, mixtures of LoRAs, and single ranks as experts (SMoRA).

All are one module, a bank of ranks whose equal blocks a router gates, or nothing does; functions
make the usual ones. The routers of single ranks are here too: a sigmoid score and a bias that keeps
all ranks busy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError, unknown
from moezoo.nn.condition_routers import ConditionRouter
from moezoo.nn.context import NO_TASK, Context, task_of_tokens
from moezoo.nn.exploration import BalancedRouter
from moezoo.nn.layers import Init, fan_in_uniform
from moezoo.nn.moe import Record
from moezoo.nn.routers import LinearRouter, Router
from moezoo.nn.surgery import MixtureSize
from moezoo.ops import lowrank
from moezoo.ops.routing import Routing, Select, dense_weights
from moezoo.ops.selection import (
    Selection,
    Weigh,
    biased,
    biased_weights_renormalised,
    renormalised_among,
    sigmoid_share,
    sigmoid_weights,
    sigmoid_weights_renormalised,
    softmax,
    softmax_of_chosen,
    unweighted,
)


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

    def selection(self, bias_E: Array) -> Select:
        return Selection(self.gate(bias_E), biased(bias_E, self.score), self.probs)


MakeGates = Callable[[Routing, int], Array]  # a decision among E experts -> gates [N, E]


class LowRank(nnx.Module):
    """scale * (x A) B over a bank of R ranks, gated in E equal blocks where there is a router.

    down [D, R] begins as PyTorch's linear layers do, up [R, O] with zeros: a fresh update adds
    nothing. The products are in `dtype`, the router's in float32. `combine` mixes the experts
    (`ops.lowrank`); it may gate `heads` parts of the inputs apart (`ops.skills`), which the router
    then has E gates for, each. `spread` makes gates of a decision. `dropout` acts with a key, on
    what router and ranks see.
    Raises UserError without a rank, and where E does not divide R.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        ranks: int,
        *,
        scale: float,
        experts: int = 1,
        heads: int = 1,
        router: Router | None = None,
        combine: lowrank.Combine = lowrank.by_block,
        spread: MakeGates = dense_weights,
        dropout: float = 0.0,
        dtype: Any = jnp.float32,
        init: Init | None = None,
        rngs: nnx.Rngs,
    ):
        check_ranks(ranks, experts)
        init = init or partial(fan_in_uniform, fan_in=inputs)
        self.down = nnx.Param(init(rngs.params(), (inputs, ranks)))
        self.up = nnx.Param(jnp.zeros((ranks, outputs)))
        self.router, self.experts, self.combine = router, experts, combine
        self.gates, self.spread = heads * experts, spread
        self.scale, self.dropout, self.dtype = scale, dropout, dtype

    def __call__(
        self,
        x_ND: Array,
        context: Context = NO_TASK,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> tuple[Array, Record | None]:
        """What is added, [N, O] in `dtype`, and the router's record if there is one.

        x_ND: B rows of T tokens each. mask_N: bool, False = padding, which no router counts.
        """
        x_ND = dropped(x_ND, self.dropout, key)
        a_DR, b_RO = (p.get_value().astype(self.dtype) for p in (self.down, self.up))
        if self.router is None:
            return self.scale * lowrank.plain(x_ND.astype(self.dtype), a_DR, b_RO), None
        # Dropout has drawn from `key` itself.
        noise = None if key is None else jax.random.fold_in(key, 1)
        routing = self.router(x_ND, context, noise, mask_N)
        gates_NE = self.spread(routing, self.gates)
        y_NO = self.combine(x_ND.astype(self.dtype), a_DR, b_RO, gates_NE)
        task_N = task_of_tokens(context, routing.mask_N.shape[0])
        return self.scale * y_NO, Record(routing, task_N, jnp.zeros((), jnp.int32))

    def constant_gates(self, task: int | None = None) -> Array | None:
        """The gates [E] of every token of a task, head by head; None where nothing is routed.

        Raises UserError where tokens decide, or tasks do and none is given.
        """
        if self.router is None:
            return None
        known = task is not None or self.router.decision == "constant"
        if not isinstance(self.router, ConditionRouter) or not known:
            raise UserError(
                "An update whose gates depend on tokens is no single matrix, and one whose gates "
                "depend on the task needs a task: give one, or keep the update in its stacked form."
            )
        return dense_weights(self.router.decide(Context(task or 0)), self.gates)[0]

    @property
    def token_choice(self) -> MixtureSize | None:
        """How many blocks of ranks there are and a token chooses; None where tokens choose none.

        Then blocks add up, each by itself, so that one can leave without changing another.
        """
        alone = self.combine is lowrank.by_block and self.gates == self.experts
        if not (alone and isinstance(self.router, LinearRouter)):
            return None
        decision = self.router.decision
        return MixtureSize(decision, self.experts, self.router.k) if decision == "token" else None

    def delta(self, gates_E: Array | None = None) -> Array:
        """The matrix [D, O] that is added under constant gates, or without any; float32."""
        a_DR, b_RO = (p.get_value().astype(jnp.float32) for p in (self.down, self.up))
        return self.scale * lowrank.delta(a_DR, b_RO, gates_E, self.combine)


def lora(
    inputs: int, outputs: int, ranks: int, *, alpha: float, rngs: nnx.Rngs, **options: Any
) -> LowRank:
    """Plain LoRA, scale alpha / R (Hu et al., arXiv:2106.09685, section 4.1)."""
    check_ranks(ranks, 1)
    return LowRank(inputs, outputs, ranks, scale=alpha / ranks, rngs=rngs, **options)


def rs_lora(
    inputs: int, outputs: int, ranks: int, *, alpha: float, rngs: nnx.Rngs, **options: Any
) -> LowRank:
    """LoRA with scale alpha / sqrt(R) (Kalajdzievski, arXiv:2312.03732)."""
    check_ranks(ranks, 1)
    return LowRank(inputs, outputs, ranks, scale=alpha / math.sqrt(ranks), rngs=rngs, **options)


MakeRouter = Callable[[int, int, int, nnx.Rngs], Router]  # (inputs, experts, k, rngs)


def token_router(
    inputs: int, experts: int, k: int, rngs: nnx.Rngs, *, select: Select | None = None
) -> LinearRouter:
    """One matrix, begun as PyTorch's linear layers.

    select: by default softmax, top-k, renormalised where k is not 1 (`selection`).
    """
    init, select = partial(fan_in_uniform, fan_in=inputs), select or renormalised_among(k)
    return LinearRouter(inputs, experts, k, select=select, init=init, rngs=rngs)


# Quirk: every chosen LoRA weighs 1, as in the top-1 baseline of SMoRA's code at evaluation. Its
# router learns nothing.
unweighted_router = partial(token_router, select=Selection(unweighted))


def mixture(
    inputs: int,
    outputs: int,
    ranks: int,
    *,
    experts: int,
    k: int,
    alpha: float,
    make_router: MakeRouter = token_router,
    rngs: nnx.Rngs,
    **options: Any,
) -> LowRank:
    """k of E LoRAs per token, R ranks in all, each with scale alpha / (R / E); soft where k is E.

    Nothing balances the default router, one matrix, whose weights add up to 1, except for k = 1: a
    single LoRA weighs its probability, or the router would not learn. A `TaskTableRouter` decides
    by the task.
    Raises UserError where k is not between 1 and E.
    """
    check_ranks(ranks, experts)
    check_choice(k, experts)
    router = make_router(inputs, experts, k, rngs)
    # alpha over the rank of one LoRA: what a token gets is as large as from a single one.
    made = {"experts": experts, "router": router, "scale": alpha * experts / ranks}
    return LowRank(inputs, outputs, ranks, rngs=rngs, **made, **options)


def rank_experts(
    inputs: int,
    outputs: int,
    ranks: int,
    *,
    active: int,
    block: int = 1,
    alpha: float,
    gate: str | None = None,
    rate: float = 1e-5,
    rngs: nnx.Rngs,
    **options: Any,
) -> LowRank:
    """SMoRA: `active` of R ranks per token, in blocks of `block`; scale alpha / block.

    With weights that sum to 1 this is the published alpha / active * B (g * A x), whose gates g sum
    to `active`. Scores, biases and choices are of whole blocks. arXiv:2501.15103, section 3.
    gate: None is "published", and "score" where one block works alone (`RankRouter`).
    Raises UserError where blocks do not divide `active` and R, where `active` exceeds R, and for a
    gate that would teach the router nothing.
    """
    check_blocks(ranks, active, block)
    experts = ranks // block
    router = RankRouter(inputs, experts, active // block, gate=gate, rate=rate, rngs=rngs)
    # Not alpha / active: that times the published gates, which sum to active, is the same.
    made = {"experts": experts, "router": router, "scale": alpha / block}
    return LowRank(inputs, outputs, ranks, rngs=rngs, **made, **options)


def check_ranks(ranks: int, experts: int) -> None:
    """Raise UserError without a rank, and where experts cannot have equally many."""
    if ranks < 1:
        raise UserError(f"The rank is {ranks}; it must be at least 1.")
    if experts < 1 or ranks % experts:
        raise UserError(f"{ranks} ranks cannot be split evenly among {experts} experts.")


def check_blocks(ranks: int, active: int, block: int) -> None:
    """Raise UserError where `active` of R ranks cannot be chosen in blocks."""
    check_ranks(ranks, 1)
    if not 1 <= active <= ranks:
        raise UserError(f"{active} active ranks of {ranks}: take 1 to {ranks}.")
    if block < 1 or ranks % block or active % block:
        raise UserError(
            f"Blocks of {block} ranks do not divide {ranks} ranks, {active} of them active: "
            "take a block that divides both."
        )


def check_choice(k: int, experts: int) -> None:
    """Raise UserError where k experts cannot be chosen."""
    if not 1 <= k <= experts:
        raise UserError(f"Cannot choose {k} of {experts} experts: take 1 to {experts}.")


def dropped(x: Array, rate: float, key: Array | None) -> Array:
    """Set single values to 0 with probability `rate` and rescale the others; nothing without a key.

    Srivastava et al. 2014, as PyTorch's Dropout.
    """
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
