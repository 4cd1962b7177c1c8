"""A layer with a low-rank update whose tokens choose blocks of ranks, as a MoE layer.

Each block, a LoRA of a mixture or a single rank (SMoRA), is an expert, so what observes, prunes and
tries MoE layers does it to updates, too. What is left of a layer is an update again (`pruned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn import surgery
from moezoo.nn.context import NO_TASK, Context, LayerOutput
from moezoo.nn.experts import Stack
from moezoo.nn.injection import Adapted
from moezoo.nn.lowrank import LowRank
from moezoo.nn.moe import MoE
from moezoo.ops import grouped, lowrank
from moezoo.ops.expert import Applied, ExpertFn, ExpertLinear, Params
from moezoo.ops.routing import Routing, dense_weights, route


@cache
def lora_of(scale: float) -> ExpertFn:
    """scale * x A B of one block."""

    def lora(params: Params, x: Array, linear: ExpertLinear) -> Array:
        return scale * linear(linear(x, params["down"]), params["up"])

    return lora


class RankBlocks(Stack):
    """E blocks of r ranks each: down [E, D, r], up [E, r, O]; what they give is times `scale`."""

    last: ClassVar[str | None] = "up"

    def __init__(self, update: LowRank):
        super().__init__(update.dtype)
        a_DR, b_RO = update.down.get_value(), update.up.get_value()
        a_EDr, b_ErO = lowrank.unstacked(a_DR, b_RO, update.experts)
        self.down, self.up = nnx.Param(a_EDr), nnx.Param(b_ErO)
        self.scale = update.scale

    @property
    def fn(self) -> ExpertFn:
        return lora_of(self.scale)

    @property
    def hidden(self) -> int:
        """r."""
        return self.down.get_value().shape[2]

    def bank(self) -> tuple[Array, Array]:
        """The blocks side by side, [D, R] and [R, O], as `LowRank` has them."""
        return lowrank.stacked(self.down.get_value(), self.up.get_value())


class RoutedUpdate(MoE):
    """The layer that an `Adapted` one is, at evaluation; takes its place under the same path.

    All ranks are computed and gates mask, as there, so that a whole layer gives the same bits.
    """

    wants_context: ClassVar[bool] = True

    def __init__(self, layer: Adapted):
        super().__init__(layer.router, RankBlocks(layer.update), grouped.blocks)
        self.base = layer.base

    def __call__(self, x: Array, context: Context = NO_TASK) -> LayerOutput:  # type: ignore[override]
        """As `Adapted`, without a key."""
        y = self.base(x)
        mask_N = None if context.mask_BT is None else context.mask_BT.reshape(-1)
        x_ND = x.reshape(-1, x.shape[-1])
        added_NO, record = self.mix(x_ND, self.router(x_ND, context, None, mask_N), context)
        return LayerOutput(y + added_NO.reshape(y.shape).astype(y.dtype), record)

    def combined(self, x_ND: Array, routing: Routing) -> Applied:
        blocks: RankBlocks = self.experts  # type: ignore[assignment]
        a_DR, b_RO = (p.astype(blocks.dtype) for p in blocks.bank())
        gates_NE = dense_weights(routing, blocks.count)
        y_NO = lowrank.by_block(x_ND.astype(blocks.dtype), a_DR, b_RO, gates_NE)
        return Applied(blocks.scale * y_NO, jnp.zeros((), jnp.int32))

    def pruned(self, kept: Sequence[int]) -> Adapted:
        """The layer with the blocks that it has, among which its tokens choose.

        kept: which ones of the router's columns they are. Where a single one is left whose weight
        is the same for every token, it is a plain LoRA.
        """
        blocks: RankBlocks = self.experts  # type: ignore[assignment]
        a_DR, b_RO = blocks.bank()
        router: Any = self.router.with_columns(kept)  # type: ignore[attr-defined]
        weight = constant_weight(router) if len(kept) == 1 else None
        made: dict[str, Any] = {"scale": blocks.scale, "experts": len(kept), "router": router}
        if weight is not None:
            made = {"scale": blocks.scale * weight}
        sizes = a_DR.shape[0], b_RO.shape[1], a_DR.shape[1]
        update = LowRank(*sizes, **made, dtype=blocks.dtype, rngs=nnx.Rngs(0))
        update.down.set_value(a_DR)
        update.up.set_value(b_RO)
        return Adapted(self.base, update)


def routed_updates(root: nnx.Module) -> tuple[str, ...]:
    """Put a `RoutedUpdate` in the place of every layer whose tokens choose; returns their paths."""

    def chooses(part: Any) -> bool:
        return isinstance(part, Adapted) and part.update.token_choice is not None

    found = surgery.find(root, chooses)
    for path, layer in found.items():
        surgery.replace(root, path, RoutedUpdate(layer))
    return tuple(found)


def constant_weight(router: Any) -> float | None:
    """What a router of one expert gives every token; None where that depends on the token."""
    logits_N1 = jnp.asarray([[-3.0], [0.5], [3.0]])
    select = router.select_for(logits_N1, None)
    weights_N = route(logits_N1, k=router.k, select=select).weights_NK[:, 0]
    return float(weights_N[0]) if bool(jnp.all(weights_N == weights_N[0])) else None


def keeps_weights(router: Any) -> bool:
    """Whether a token that chooses kept experts only weighs them as if the others were there."""
    experts = router.kernel.get_value().shape[1]
    logits_1E = 2 * jnp.cos(jnp.arange(experts, dtype=jnp.float32) * 2.4)[None]
    routing = route(logits_1E, k=router.k, select=router.select_for(logits_1E, None))
    kept = sorted(int(e) for e in routing.experts_NK[0])
    again = router.among(routing, kept).weights_NK
    return bool(jnp.allclose(again, routing.weights_NK, atol=1e-6))
