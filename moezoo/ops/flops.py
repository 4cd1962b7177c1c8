"""Floating-point operations of a traced program: those of its matrix products and convolutions.

Loops count as often as they run: what the compiler reports has the body of a loop once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

RARELY = "rarely"  # the name of a jitted function for steps that are seldom


def product_flops(jaxpr: Any) -> float:
    """Floating-point operations of all matrix products and convolutions, two per multiply-add.

    jaxpr: of `jax.make_jaxpr` or `jax.jit(f).trace(...)`; what `shard_map` holds counts for all its
    devices. A `while` of unknown length counts as one round, of a `cond` the dearest branch counts;
    what is called `RARELY` does not.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops(eqn) for eqn in jaxpr.eqns)


def _flops(eqn: Any) -> float:
    name, params = eqn.primitive.name, eqn.params
    if params.get("name") == RARELY:
        return 0.0
    if name == "dot_general":
        return _dot(eqn)
    if name in ("ragged_dot", "ragged_dot_general"):
        rows, inner = eqn.invars[0].aval.shape[-2:]
        # Each row times one matrix: the useful work, not the E times of XLA's way on CPU and GPU.
        return 2.0 * rows * inner * eqn.invars[1].aval.shape[-1]
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / outputs
    if name == "cond":
        return max(product_flops(branch) for branch in params["branches"])
    inside = sum(product_flops(inner) for inner in _inner(params))
    if name == "scan":
        return params["length"] * inside
    if name == "shard_map":
        return _devices(params) * inside
    return inside


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _devices(params: Any) -> int:
    # The new ones alone: a `shard_map` around this one has counted its own.
    manual, sizes = params["newly_manual_axes"], dict(params["mesh"].shape)
    return math.prod(sizes[axis] for axis in manual)


def _inner(params: Any) -> Iterator[Any]:
    """The programs among an operation's parameters; derivatives given as functions are none."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if hasattr(getattr(one, "jaxpr", one), "eqns"):
                yield one
