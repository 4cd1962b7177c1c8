"""What is left of a model for one task: a function of flat weights and a batch of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.interpreters import partial_eval

from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.plan import Plan
from moezoo.nn import module
from moezoo.ops.routing import Routing

PathWeights = Mapping[str, Any]


class Prediction(NamedTuple):
    """What a task path gives.

    logits: float32, raw network outputs: [B,H,W,C] at image resolution where the task predicts
    every pixel, [B,C] where it predicts one class or a few numbers of an example.
    violations_B: int32, tokens of the example, over all MoE layers, that asked for an expert which
    is not there. 0 means: the full model's logits, up to the order in which a compiler adds.
    """

    logits: Array
    violations_B: Array


class Pass(NamedTuple):
    """Logits, as a `Prediction` has them, and every MoE layer's routing over all its experts."""

    logits: Array
    routing: dict[str, Routing]


LayerKind = Literal["exact_fold", "exact_support", "whole", "pruned"]


class PathLayer(NamedTuple):
    """A MoE layer of a path: what its router's decision depends on, and which experts it has.

    reach: the experts that any token can ask for, ascending; None: any of them.   hidden: features
    inside one expert; None where experts are linear maps, or mixed.
    """

    decision: str
    experts: int
    kept: tuple[int, ...]
    chosen: int
    reach: tuple[int, ...] | None = None
    hidden: int | None = None

    @property
    def width(self) -> int | None:
        """Features inside all experts that are there: what is left of the layer."""
        return None if self.hidden is None else self.hidden * len(self.kept)

    @property
    def removed(self) -> tuple[int, ...]:
        """Ids of the full model's experts that are not there, ascending."""
        return tuple(e for e in range(self.experts) if e not in self.kept)

    @property
    def within(self) -> tuple[int, ...]:
        """The experts that any token can ask for, ascending."""
        return tuple(range(self.experts)) if self.reach is None else self.reach

    @property
    def missing(self) -> tuple[int, ...]:
        """Ids of experts that are not there although a token may ask for them, ascending."""
        return tuple(e for e in self.within if e not in self.kept)

    @property
    def kind(self) -> LayerKind:
        """What was done to the layer.

        exact_fold: the task decides, and the layer became a dense one. exact_support: experts
        that no token can ask for have left. whole: tokens decide, and all experts are there.
        pruned: tokens decide, and stand-ins answer for some experts.
        """
        if self.missing:
            return "pruned"
        if not self.kept:
            return "exact_fold"
        return "exact_support" if self.removed else "whole"


# By identity: arrays do not compare, and `compare` keeps programs by path.
@dataclass(frozen=True, eq=False)
class TaskPath:
    """One task's computation.

    input: what it reads.
    weights: flat, "blocks/0/attn/qkv/kernel" -> array; exactly what the computation reads.
    definition: the module without arrays.   stats: names that are statistics, not parameters.
    absent: arrays of the module that the computation never reads and the path has not got.
    layers: MoE layer path -> Layer.   plan: the experts it has.   mixtures: likewise what
    else mixes experts, or did in the full model (`specialise.Specialised`).
    own_count: whether its operations are counted in its program, since the model's formula is about
    another computation.
    """

    task: str
    input: InputSpec
    weights: dict[str, Array]
    definition: Any
    stats: frozenset[str]
    absent: dict[str, jax.ShapeDtypeStruct]
    layers: dict[str, PathLayer]
    plan: Plan
    mixtures: Mapping[str, PathLayer] = field(default_factory=dict)
    own_count: bool = False

    def module(self, weights: PathWeights) -> Any:
        """The model holding these weights (or tracers); what is absent is zero and never read."""
        absent = {name: jnp.zeros(a.shape, a.dtype) for name, a in self.absent.items()}
        flat = {**weights, **absent}
        params = {name: a for name, a in flat.items() if name not in self.stats}
        stats = {name: a for name, a in flat.items() if name in self.stats}
        return module.merge(self.definition, module.unflatten(params), module.unflatten(stats))

    @property
    def report(self) -> dict[str, dict[str, Any]]:
        """What became of every layer that had experts in the full model, by path."""
        every = {**self.layers, **self.mixtures}
        return {
            name: every[name]._asdict() | {"kind": every[name].kind, "width": every[name].width}
            for name in sorted(every)
        }

    def run(self, weights: PathWeights, given: Array) -> Pass:
        """Pure function: logits and routings."""
        output = self.module(weights)(given, tasks=(self.task,))
        routing = {name: record.routing for name, record in output.records.items()}
        return Pass(output.predictions[self.task].astype(jnp.float32), routing)

    def call(self, weights: PathWeights, given: Array) -> Prediction:
        """Pure function: logits and violations; jit or export it."""
        logits, routing = self.run(weights, given)
        violations_B = jnp.zeros((given.shape[0],), jnp.int32)
        for name, layer in self.layers.items():
            if layer.missing:
                violations_B += violated(routing[name], layer.missing, given.shape[0])
        return Prediction(logits, violations_B)

    @cached_property
    def _jitted(self) -> Callable[[PathWeights, Array], Prediction]:
        return jax.jit(self.call)

    def __call__(self, given: Any) -> Prediction:
        """Predict a batch of `input`, float32 [B, *input.shape]."""
        return self._jitted(self.weights, given)

    @property
    def exact(self) -> bool:
        """Whether every expert is there that a token can ask for: nothing is approximated."""
        return not any(layer.missing for layer in self.layers.values())


def violated(routing: Routing, removed: tuple[int, ...], rows: Any) -> Array:
    """Tokens of each batch row that ask for at least one of the removed experts, int32 [B]."""
    asks_NK = jnp.any(routing.experts_NK[..., None] == jnp.asarray(removed, jnp.int32), axis=-1)
    return jnp.sum(jnp.any(asks_NK, axis=-1).reshape(rows, -1), axis=1, dtype=jnp.int32)


def shapes(weights: PathWeights) -> dict[str, jax.ShapeDtypeStruct]:
    """The same names with shapes instead of arrays."""
    return {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}


def unread(call: Callable[..., Any], weights: PathWeights, given: Any) -> list[str]:
    """Names of the weights that `call` never reads, found by tracing it, not by their names.

    given: the form of the call's second argument. Works by whole arrays: a stack of which only one
    slice is read counts as read.
    """
    program = jax.make_jaxpr(call)(shapes(weights), given).jaxpr
    # What JAX itself does before it lowers a program: the export's weights are those that it keeps.
    _, read = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    # Dictionaries flatten in sorted order; what is given is the last argument.
    return [name for name, needed in zip(sorted(weights), read, strict=False) if not needed]


@contextmanager
def no_source_locations() -> Iterator[None]:
    """Lowered programs carry no file names: they would reveal paths and change the hash."""
    setting = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, setting)
    jax.config.update(setting, 0)
    try:
        yield
    finally:
        jax.config.update(setting, before)
