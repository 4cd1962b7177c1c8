"""A path on which the removal of experts is tried: which ones are gone is data, not structure.

`deploy.pruned` takes experts out of the arrays, so each choice of experts is a program of its own.
A trade-off curve asks for dozens of choices of one path. Here all experts stay where they are, and
each layer has an array that says which of them are kept; one compiled program serves every choice,
with the answers of the path from which the others are really gone (a test holds the two together).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.compare import Runner, Tally
from moezoo.deploy.novices import AffineNovices, NoviceKind
from moezoo.deploy.path import PathWeights, TaskPath
from moezoo.deploy.pruned import KeptOnly, divide, kept_of
from moezoo.deploy.scores import Kept
from moezoo.deploy.specialise import copy_of, layers_of
from moezoo.nn import module, surgery
from moezoo.nn.context import Context
from moezoo.nn.moe import MoE, MoEOutput, Record
from moezoo.ops.routing import Routing


class OnTrial(nnx.Module):
    """What is tried at a layer of E experts: kept [E], 1 or 0, and a novice for each expert.

    novices: of rank r for all E experts, whatever is kept; constants are of rank 0.
    """

    def __init__(self, experts: int, width: int, rank: int):
        self.kept = nnx.Param(jnp.ones((experts,), jnp.float32))
        shapes = (experts, width), (width, experts, rank), (experts, rank, width)
        self.novices = AffineNovices(*(jnp.zeros(shape) for shape in shapes))

    def gone(self, routing: Routing) -> tuple[Routing, Array]:
        """The choices of kept experts (others -1 and 0), and the weights of the others, [N, E]."""
        kept_E = self.kept.get_value() > 0
        asked_NK = jnp.maximum(routing.experts_NK, 0)
        kept_NK = (routing.experts_NK >= 0) & kept_E[asked_NK]
        lost_NK = (routing.experts_NK >= 0) & ~kept_NK
        hot_NKE = (asked_NK[..., None] == jnp.arange(len(kept_E))) & lost_NK[..., None]
        gates_NE = jnp.sum(jnp.where(hot_NKE, routing.weights_NK[..., None], 0.0), axis=1)
        experts_NK = jnp.where(kept_NK, routing.experts_NK, -1)
        weights_NK = jnp.where(kept_NK, routing.weights_NK, 0.0)
        return routing._replace(experts_NK=experts_NK, weights_NK=weights_NK), gates_NE


@dataclass(frozen=True)
class Tried:
    """The `mixing` of a layer with a `trial`; `had` is the one that it replaces."""

    had: KeptOnly

    def __call__(self, layer: Any, x: Array, routing: Routing, context: Context) -> MoEOutput:
        """As `pruned.StandIns` of the experts that the choice keeps."""
        rest, gates_NE = layer.trial.gone(routing)
        there = divide(rest, self.had.kept, self.had.removed).kept
        y_ND, dropped = layer.combined(x, there)

        def add(y_ND: Array) -> Array:
            return y_ND + layer.trial.novices(x, gates_NE).astype(y_ND.dtype)

        # As in `pruned`: rows that lost nothing keep their bits.
        y_ND = lax.cond(jnp.any(gates_NE != 0), add, lambda y_ND: y_ND, y_ND)
        return _output(y_ND, routing, dropped)


@dataclass(frozen=True)
class TriedCut(Tried):
    """The same as `pruned.Rerouted`: tokens choose among the kept experts, no novice answers."""

    def __call__(self, layer: Any, x: Array, routing: Routing, context: Context) -> MoEOutput:
        kept_E = layer.trial.kept.get_value() > 0
        again = layer.router.restricted(routing, kept_E)
        there = divide(again, self.had.kept, self.had.removed).kept
        y_ND, dropped = layer.combined(x, there)
        return _output(y_ND, routing, dropped)


def _output(y_ND: Array, routing: Routing, dropped: Array) -> MoEOutput:
    task_N = jnp.zeros(routing.mask_N.shape, jnp.int32)
    return MoEOutput(y_ND, Record(routing, task_N, dropped))


class Trial:
    """A whole path and the program that answers for any choice of its experts."""

    def __init__(self, whole: TaskPath, widths: Mapping[str, int], rank: int, *, cut: bool = False):
        """widths: D of every layer.   rank: of the novices that will be tried."""
        model = copy_of(whole.module(whole.weights))
        for name, layer in layers_of(model).items():
            surgery.replace(model, name, _tried(layer, widths[name], rank, cut=cut))
        parts = module.split(model)
        own = module.flatten(parts.params) | module.flatten(parts.stats)
        self.whole, self.path = whole, replace(whole, definition=parts.definition)
        self.fixed = whole.weights
        self.tried = {name: array for name, array in own.items() if "/trial/" in name}
        self._run = jax.jit(self._tally)

    def arrays(self, kept: Kept, found: Calibration, kind: NoviceKind) -> PathWeights:
        """A choice of experts, with novices of a kind for all of them."""
        made: dict[str, Any] = {}
        for name, layer in self.whole.layers.items():
            at = f"{name}/trial"
            kept_E = np.isin(np.arange(layer.experts), kept[name]).astype(np.float32)
            novices = module.split(kind.make(found.of(name), range(layer.experts))).params  # type: ignore
            flat = {f"{at}/novices/{k}": v for k, v in novices.items()}
            made |= {f"{at}/kept": jnp.asarray(kept_E)} | flat
        # Constants are maps of rank 0: with a higher one, maps of zeros.
        return {n: made.get(n, jnp.zeros_like(a)) for n, a in self.tried.items()}

    def of(
        self,
        kept: Kept,
        found: Calibration,
        kind: NoviceKind,
        weights: PathWeights | None = None,
    ) -> Runner:
        """The path without the other experts, as something to compare with.

        weights: in the place of the whole path's.
        """
        fixed = self.fixed if weights is None else {n: weights[n] for n in self.fixed}
        return partial(self._run, fixed, self.arrays(kept, found, kind))

    def _tally(self, fixed: PathWeights, tried: PathWeights, given: Array) -> Tally:
        logits, routing = self.path.run({**fixed, **tried}, given)
        b = given.shape[0]
        columns = [
            _columns(routing[name], tried[f"{name}/trial/kept"], b) for name in self.path.layers
        ]
        return Tally(logits, *(jnp.stack(c, axis=1) for c in zip(*columns, strict=True)))


def _tried(layer: MoE, width: int, rank: int, *, cut: bool) -> MoE:
    made, had = copy_of(layer), kept_of(layer)
    mixing: Callable[[Any], Tried] = TriedCut if cut else Tried
    made.trial = OnTrial(len(had.kept) + len(had.removed), width, rank)
    made.mixing = mixing(had)
    return made


def _columns(routing: Routing, kept_E: Array, b: int) -> tuple[Array, Array, Array]:
    asked_NK = jnp.maximum(routing.experts_NK, 0)
    lost_NK = (routing.experts_NK >= 0) & ~(kept_E[asked_NK] > 0)
    weights_NK = routing.weights_NK
    return (
        jnp.sum(jnp.any(lost_NK, axis=-1).reshape(b, -1), axis=1, dtype=jnp.int32),
        weights_NK.reshape(b, -1).sum(1),
        jnp.where(lost_NK, 0.0, weights_NK).reshape(b, -1).sum(1),
    )
