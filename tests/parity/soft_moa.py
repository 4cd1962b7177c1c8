"""The published names of Soft-MoA's parts as our paths, and modules that hold fixture weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moezoo.backbones.ast import ASTConfig
from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.weights.ast import AST_NAMES
from moezoo.weights.names import (
    ArrayLayout,
    NameTable,
    ParameterName,
    batch_norm,
    linear,
    norm,
    to_ours,
)
from tests.models.tiny import quick_jit

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}

# Conv1d [out, in / groups, k] -> [k, in / groups, out]; with k = 1 also as a linear layer.
CONV1D = ArrayLayout(lambda a: a.transpose(2, 1, 0), lambda a: a.transpose(2, 1, 0))
POINTWISE = ArrayLayout(lambda a: a[:, :, 0].T, lambda a: a.T[:, :, None])

BOTTLENECK: NameTable = [*linear("fc1", "linear_downsample"), *linear("fc2", "linear_upsample")]
CONVPASS: NameTable = [
    *linear("down", "adapter_down"),
    *linear("conv", "adapter_conv", CONV1D),
    *linear("up", "adapter_up"),
]
CONFORMER: NameTable = [
    *norm("norm", "lnorm"),
    *linear("down", "pwise_conv1", POINTWISE),
    *linear("conv", "dwise_conv", CONV1D),
    *batch_norm("batch_norm", "bnorm"),
    *linear("up", "pwise_conv2", POINTWISE),
]
ROUTER: NameTable = [
    ParameterName("router/kernel", "slot_params"),
    ParameterName("router/scale", "scale"),
    *linear("router", "router.ff"),
]
# Convpass as an expert of a mixture: its convolution, which does nothing, has no place with us.
EXPERT: NameTable = [
    *linear("experts/fc1", "moa.linear_downsample"),
    *linear("experts/fc2", "moa.linear_upsample"),
    *linear("experts/fc1", "moa.adapter_down"),
    *linear("experts/fc2", "moa.adapter_up"),
]
MIXTURE: NameTable = [*ROUTER, *EXPERT]
PREFIXES = ("blocks/{0}/", "encoder.layer.{0}.")
LAYER: NameTable = [
    ParameterName(
        line.ours.removeprefix(PREFIXES[0]), line.theirs.removeprefix(PREFIXES[1]), line.layout
    )
    for line in AST_NAMES
    if line.ours.startswith("blocks/")
]


def stacked(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`moa.<e>.name` of every expert e as one array `moa.name` [E, ...]; the rest as it is."""
    experts: dict[str, dict[int, np.ndarray]] = {}
    out: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        words = name.split(".")
        numbers = [i for i, word in enumerate(words) if word.isdigit()]
        if not numbers:
            out[name] = array
            continue
        rest = ".".join(["moa", *words[numbers[-1] + 1 :]])
        experts.setdefault(rest, {})[int(words[numbers[-1]])] = array
    return out | {n: np.stack([of[e] for e in sorted(of)]) for n, of in experts.items()}


def ours(arrays: Mapping[str, np.ndarray], table: NameTable, skip: tuple[str, ...] = ()) -> dict:
    """Weights or gradients by our paths; every name must be known, but for those with `skip`."""
    state = stacked(arrays)
    found = to_ours({n: a for n, a in state.items() if not any(s in n for s in skip)}, table)
    assert not found.unknown, found.unknown
    return found.arrays


def holding(made: nnx.Module, arrays: Mapping[str, np.ndarray]) -> module.ModuleParts:
    """The parts of a module with these arrays; it has no other parameters or statistics."""
    parts = module.split(made)
    groups = []
    for tree in (parts.params, parts.stats):
        flat = {path: jnp.asarray(arrays[path]) for path in module.flatten(tree)}
        for path, leaf in module.flatten(tree).items():
            assert flat[path].shape == leaf.shape, path
        groups.append(module.unflatten(flat))
    assert set(arrays) == {p for g in groups for p in module.flatten(g)}
    return module.ModuleParts(parts.definition, *groups)


def run(parts: module.ModuleParts, x: np.ndarray, cot: np.ndarray, **context: Any) -> tuple:
    """(y, record, statistics after, gradients of sum(y * cot) for parameters and x)."""

    def loss(params: Any, x: jax.Array) -> tuple:
        own = module.merge(parts.definition, params, parts.stats)
        wants = getattr(own, "wants_context", False)
        output = own(x, Context(**context)) if wants else (own(x), None)
        return jnp.sum(output[0] * cot), (*output, module.updated_stats(own))

    both = quick_jit(jax.grad(loss, (0, 1), has_aux=True))
    (params, gx), (y, record, stats) = both(parts.params, jnp.asarray(x))
    return y, record, stats, module.flatten(params), gx


def check_gradients(found: Mapping[str, Any], wanted: Mapping[str, np.ndarray]) -> None:
    """Every given gradient; parameters that have none there have none here either."""
    assert set(wanted) <= set(found)
    for path, gradient in found.items():
        if path in wanted:
            np.testing.assert_allclose(gradient, wanted[path], err_msg=path, **CLOSE)
        else:
            assert not np.any(gradient), path


def sizes(z: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray], **more: Any) -> ASTConfig:
    """The sizes of a block whose weights are `arrays` by our paths."""
    width, hidden = arrays["mlp/fc1/kernel"].shape
    options: dict[str, Any] = {"norm_epsilon": float(z["eps"])} if "eps" in z else {}
    return ASTConfig(width=width, hidden=hidden, heads=int(z["heads"]), depth=1, **(options | more))
