"""A MoE layer without some of its experts: the router stays whole, novices answer for the rest.

Or, in formats that have no place for novices, the router loses their columns (`Rerouted`): a token
that would have asked for a removed expert asks for another one.

The router keeps a column for every expert of the full model. With a softmax over all experts
before the top-k, taking columns away would change every weight that is left. A token that asks
for a removed expert gets what its novice says instead (`deploy.novices`: its mean output, or a map
of low rank), times the same weight, and counts as a violation; a token that asks for none gets what
it got before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from moezoo.deploy.novices import Novices
from moezoo.deploy.specialise import copy_of
from moezoo.nn.context import Context
from moezoo.nn.moe import MoE, MoEOutput, Record
from moezoo.ops.routing import Routing


class Divided(NamedTuple):
    """A routing over all experts, divided into what is kept and what is replaced.

    kept: experts renumbered among the kept ones, -1 and weight 0 where removed.
    gates_NR: float32, weight of each removed expert for each token.
    """

    kept: Routing
    gates_NR: Array


def divide(routing: Routing, kept: Sequence[int], removed: Sequence[int]) -> Divided:
    """Divide a routing over E = len(kept) + len(removed) experts."""
    slots = {expert: slot for slot, expert in enumerate(kept)}
    slot_E = jnp.asarray([slots.get(e, -1) for e in range(len(kept) + len(removed))], jnp.int32)
    chosen_NK = routing.experts_NK >= 0
    # -1 would read the last expert's slot.
    slot_NK = jnp.where(chosen_NK, slot_E[jnp.maximum(routing.experts_NK, 0)], -1)
    weights_NK = jnp.where(slot_NK >= 0, routing.weights_NK, 0.0)
    hot_NKR = routing.experts_NK[..., None] == jnp.asarray(removed, jnp.int32)
    gates_NR = jnp.sum(jnp.where(hot_NKR, routing.weights_NK[..., None], 0.0), axis=1)
    return Divided(routing._replace(experts_NK=slot_NK, weights_NK=weights_NK), gates_NR)


@dataclass(frozen=True)
class KeptOnly:
    """The `mixing` of a layer of a single task that has only the experts `kept`, ids ascending.

    removed: the other experts of the full model. The record holds the whole router's decision,
    removed experts included.
    """

    kept: tuple[int, ...]
    removed: tuple[int, ...]

    def __call__(self, layer: Any, x: Array, routing: Routing, context: Context) -> MoEOutput:
        """As `moe.weigh_and_add`; the record's `task_N` is 0, there is one task only."""
        divided = divide(routing, self.kept, self.removed)
        y_ND, dropped = layer.combined(x, divided.kept)
        y_ND = self.answered(layer, x, y_ND, divided.gates_NR)
        task_N = jnp.zeros(routing.mask_N.shape, jnp.int32)
        return MoEOutput(y_ND, Record(routing, task_N, dropped))

    def answered(self, layer: Any, x: Array, y_ND: Array, gates_NR: Array) -> Array:
        """What the kept experts gave and what stands in for the removed ones: here nothing does."""
        return y_ND


class StandIns(KeptOnly):
    """The same where removed experts may be asked for: the layer's `novices` answer for them."""

    def answered(self, layer: Any, x: Array, y_ND: Array, gates_NR: Array) -> Array:
        return _stand_in(x, y_ND, gates_NR, layer.novices)


@dataclass(frozen=True)
class Rerouted:
    """The `mixing` of a layer whose router chooses among the experts `kept`, as if it knew no more.

    The layer's router keeps all its columns, and the record holds its whole decision: by that,
    violations are counted. What is computed is that of a router without the others' columns.
    """

    kept: tuple[int, ...]

    def __call__(self, layer: Any, x: Array, routing: Routing, context: Context) -> MoEOutput:
        """As `moe.weigh_and_add` of the kept experts; the record's `task_N` is 0."""
        y_ND, dropped = layer.combined(x, layer.router.among(routing, self.kept))
        task_N = jnp.zeros(routing.mask_N.shape, jnp.int32)
        return MoEOutput(y_ND, Record(routing, task_N, dropped))


def rerouted_layer(layer: MoE, kept: Sequence[int]) -> MoE:
    """A layer that `path_layer` made, whose tokens choose among the experts `kept` only."""
    made, ids = copy_of(layer), tuple(int(e) for e in kept)
    had = kept_of(layer).kept
    made.experts = made.experts.take(tuple(had.index(e) for e in ids))
    made.mixing = Rerouted(ids)
    return made


def kept_of(layer: MoE) -> KeptOnly:
    """What a layer of a path, which `path_layer` made, has."""
    mixing: Any = layer.mixing
    return mixing


def path_layer(layer: MoE, kept: Sequence[int], experts: int) -> MoE:
    """The same layer, of any kind, with those of its `experts` experts only that can be asked for.

    kept: ids of the full model in ascending order.
    """
    made, ids = copy_of(layer), tuple(int(e) for e in kept)
    if len(ids) < experts:
        made.experts = made.experts.take(ids)
    made.mixing = KeptOnly(ids, tuple(i for i in range(experts) if i not in ids))
    return made


def pruned_layer(layer: MoE, kept: Sequence[int], novices: Novices) -> MoE:
    """A layer that `path_layer` made, with the experts `kept` of those that it has.

    novices: what stands in for every other expert of the full model, in ascending order of ids.
    """
    made, ids, had = copy_of(layer), tuple(int(e) for e in kept), kept_of(layer)
    made.experts = made.experts.take(tuple(had.kept.index(e) for e in ids))
    everyone = sorted((*had.kept, *had.removed))
    made.mixing = StandIns(ids, tuple(e for e in everyone if e not in ids))
    # A module, so that its parameters go with the weights wherever they go.
    made.novices = novices
    return made


def _stand_in(x: Array, y_ND: Array, gates_NR: Array, novices: Novices) -> Array:
    """Add what novices say, times the gates of the experts that they replace, to what others gave.

    Rows without violation add 0, so their bits stay. The branch skips batches without any, and it
    is a border that the compiler fuses nothing across: what follows is compiled as in the full
    model, whose reductions would otherwise be free to add in another order.
    """

    def add(y_ND: Array) -> Array:
        return y_ND + novices(x, gates_NR).astype(y_ND.dtype)

    return lax.cond(jnp.any(gates_NR != 0), add, lambda y_ND: y_ND, y_ND)
