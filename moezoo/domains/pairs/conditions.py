"""What is left of a conditional model under one condition: dense layers, no router, no experts.

A decision that depends only on a condition is taken once; its mixtures of linear maps become plain
matrices, merged exactly as a forward pass would merge them. Several conditions share every array
that is equal: all of the model except the merged matrices, and those too if conditions have the
same rows (all inputs that are an image, for example).

The release's parameter counts for deployment refer to two rows, those of an image with a text: 43 M
more than dense in base size, 151 M in large size (tests).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.backbones.conditional import ConditionalBlock
from moezoo.deploy.path import PathWeights, shapes, unread
from moezoo.deploy.specialise import copy_of
from moezoo.errors import UserError
from moezoo.models.conditional_moe.model import ConditionalMoE, EncoderFeatures
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.nn import module, surgery
from moezoo.nn.conditional import LinearByRow, RowLevel
from moezoo.nn.context import Context

# A half of a block: its levels, and the layers that take the decisions of each.
LAYERS: dict[str, dict[str, tuple[str, ...]]] = {
    "attn": {"level": ("qkv", "proj")},
    "mlp": {"level": ("fc1", "fc2")},
}
SEPARATE = {"level": ("fc1",), "level2": ("fc2",)}


def specialise(model: ConditionalMoE, condition: str, inputs: EncoderInputs) -> ConditionalMoE:
    """A copy of the model whose layers are dense: it can be used only under `condition`.

    inputs: what will be encoded; only the shapes matter. Raises UserError if tokens decide, or if
    the condition does not fit the inputs.
    """
    parts = model.tokens.parts(inputs)
    context = model.context(condition, parts)
    made = copy_of(model)
    for i, block in enumerate(made.encoder.blocks):
        fold(block, context, f"encoder/blocks/{i}")
    made.only = (condition, tuple(part.kind for part in parts))
    return made


def fold(block: ConditionalBlock, context: Context, path: str) -> None:
    """Put dense layers in place of a block's mixtures, and remove its levels."""
    for half, layers in LAYERS.items():
        own = getattr(block, half)
        apart = getattr(own, "level2", None) is not None
        for level, names in (SEPARATE if apart else layers).items():
            _fold(own, level, names, context, f"{path}/{half}")


def _fold(half: Any, name: str, layers: tuple[str, ...], context: Context, path: str) -> None:
    level = getattr(half, name)
    if level is None:
        return
    if not isinstance(level, RowLevel):
        raise UserError(
            f"The router of {path} decides by tokens, so no condition fixes it: only models of "
            "level modality, task or attribute can be specialised."
        )
    weights_RE = level.decide(jnp.zeros((1, 1, 1)), context).weights_RE
    for layer in layers:
        rows = getattr(half, layer).experts.folds(weights_RE)
        surgery.replace(half, layer, rows[0] if len(rows) == 1 else LinearByRow(rows))
    setattr(half, name, None)


class Cost(NamedTuple):
    """Parameters, their bytes, and floating-point operations of encoding one example."""

    parameters: int
    bytes: int
    flops: float


@dataclass(frozen=True, eq=False)
class ConditionPath:
    """The encoder of one condition as a pure function of flat weights, which hold what it reads.

    weights: "encoder/blocks/0/attn/qkv/kernel" -> array. absent: parameters of the module that this
    condition never reads, such as positions of texts when images are encoded.
    """

    condition: str
    inputs: EncoderInputs
    definition: Any
    weights: dict[str, Array]
    absent: dict[str, jax.ShapeDtypeStruct]

    def module(self, weights: PathWeights) -> ConditionalMoE:
        """The specialised model with these weights (or tracers); absent ones are zero."""
        absent = {name: jnp.zeros(a.shape, a.dtype) for name, a in self.absent.items()}
        flat = module.unflatten({**weights, **absent})
        return module.merge(self.definition, flat, {})

    def encode(self, weights: PathWeights, inputs: EncoderInputs) -> Array:
        """Pure function: features of all tokens, float32 [B, T, D]; jit or export it."""
        return _tokens(self.module(weights), self.condition, inputs)

    def cost(self) -> Cost:
        """The cost of encoding one example, counted in the compiled program."""
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), self.inputs)
        lowered = jax.jit(self.encode).lower(self.weights, one)
        analysed: Any = lowered.compile().cost_analysis()
        sizes = [int(np.prod(a.shape)) for a in self.weights.values()]
        held = [n * a.dtype.itemsize for n, a in zip(sizes, self.weights.values(), strict=True)]
        return Cost(sum(sizes), sum(held), float(analysed["flops"]))


def condition_path(model: ConditionalMoE, condition: str, inputs: EncoderInputs) -> ConditionPath:
    """The path of one condition; see `specialise`."""
    made = specialise(model, condition, inputs)
    definition, params, _ = module.split(made)
    flat = module.flatten(params)
    struct = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), inputs)
    whole = ConditionPath(condition, struct, definition, flat, {})
    names = unread(whole.encode, flat, struct)
    absent = shapes({name: flat[name] for name in names})
    used = {name: a for name, a in flat.items() if name not in absent}
    return ConditionPath(condition, struct, definition, used, absent)


def _tokens(model: ConditionalMoE, condition: str, inputs: EncoderInputs) -> Array:
    done: EncoderFeatures = model.encode(inputs, condition)
    return done.x_BTD.astype(jnp.float32)


@dataclass(frozen=True, eq=False)
class ConditionSet:
    """The paths of several conditions; equal arrays are stored once.

    arrays: digest -> array. names: condition -> {name of the weight: digest}.
    Equal means to the last bit: a row that is decided alone under one condition and beside another
    row under a second one may be rounded differently and is then stored twice. The published table
    has no such row; modalities do.
    """

    arrays: dict[str, Array]
    names: dict[str, dict[str, str]]
    paths: dict[str, ConditionPath]

    @property
    def parameters(self) -> int:
        """The number of parameters in all arrays, each array counted once."""
        return sum(int(np.prod(a.shape)) for a in self.arrays.values())

    def costs(self) -> dict[str, Cost]:
        """The cost of each path by itself; their parameters overlap."""
        return {condition: path.cost() for condition, path in self.paths.items()}

    def shared(self, first: str, second: str) -> int:
        """The number of parameters that two conditions share."""
        common = set(self.names[first].values()) & set(self.names[second].values())
        return sum(int(np.prod(self.arrays[digest].shape)) for digest in common)

    def weights(self, condition: str) -> dict[str, Array]:
        """The weights of one path."""
        return {name: self.arrays[digest] for name, digest in self.names[condition].items()}


def condition_set(model: ConditionalMoE, wanted: Mapping[str, EncoderInputs]) -> ConditionSet:
    """The paths of `wanted`, conditions with examples of their inputs."""
    if not wanted:
        raise UserError("No condition was asked for: name at least one, with its inputs.")
    arrays: dict[str, Array] = {}
    names: dict[str, dict[str, str]] = {}
    paths: dict[str, ConditionPath] = {}
    for condition, inputs in wanted.items():
        path = condition_path(model, condition, inputs)
        names[condition] = {name: _digest(a) for name, a in path.weights.items()}
        for name, a in path.weights.items():
            arrays.setdefault(names[condition][name], a)
        own = {name: arrays[digest] for name, digest in names[condition].items()}
        shared = ConditionPath(condition, path.inputs, path.definition, own, path.absent)
        paths[condition] = shared
    return ConditionSet(arrays, names, paths)


def _digest(a: Array) -> str:
    held = np.ascontiguousarray(np.asarray(a))
    return hashlib.sha256(f"{held.dtype}{held.shape}".encode() + held.tobytes()).hexdigest()
