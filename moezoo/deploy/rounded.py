"""A path whose weights are stored in fewer bits, and computed with as float32.

int8: matrices as whole numbers from -127 to 127 with one float32 scale for every output channel,
symmetric around 0, the rest as it is. bfloat16: every array. Routers keep their float32, those of
mixtures that are no MoE layers too: a token near a tie would go to another expert, and their
matrices are small. What rounding costs is measured
like everything else about a path: against the path before it, on held-out examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.deploy.path import PathWeights, TaskPath
from moezoo.errors import UserError
from moezoo.nn import surgery
from moezoo.nn.routers import Decider

SCALE = "scale_of_"  # before the last part of a rounded array's name
LARGEST = 127  # of an int8: -128 has no counterpart
TYPES = ("float32", "bfloat16", "int8")


def rounded(path: TaskPath, kind: str) -> TaskPath:
    """The path with weights of a type of `TYPES`; itself for float32.

    Raises UserError for weights that are no float32 to begin with.
    """
    if kind == "float32":
        return path
    if kind not in ROUNDED:
        raise UserError(f"--weights is {kind}; it must be one of {', '.join(TYPES)}.")
    others = {str(w.dtype) for w in path.weights.values() if w.dtype != jnp.float32}
    if others:
        raise UserError(
            f"--weights {kind} rounds float32, but this model has {', '.join(sorted(others))} "
            "weights: leave it out."
        )
    routers = tuple(f"{name}/" for name in surgery.find(path.module(path.weights), Decider))
    weights: dict[str, Array] = {}
    for name, array in path.weights.items():
        keep = name.startswith(routers)
        weights |= {name: array} if keep else ROUNDED[kind](name, array)
    return RoundedPath(**vars_of(replace(path, weights=weights)))


class RoundedPath(TaskPath):
    """A path that reads its weights as they are stored and computes in float32."""

    def module(self, weights: PathWeights) -> Any:
        """The model holding the float32 that these weights stand for."""
        return super().module(restored(weights))


def vars_of(path: TaskPath) -> dict[str, Any]:
    """The fields of a path by name."""
    return {name: getattr(path, name) for name in path.__dataclass_fields__}


def restored(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Float32 arrays under their own names."""
    found = {}
    for name, array in weights.items():
        if _scale_name(name) in weights:
            array = array.astype(jnp.float32) * weights[_scale_name(name)]
        elif array.dtype == jnp.bfloat16:
            array = array.astype(jnp.float32)
        if not name.rpartition("/")[2].startswith(SCALE):
            found[name] = array
    return found


def _scale_name(name: str) -> str:
    folder, _, last = name.rpartition("/")
    return f"{folder}/{SCALE}{last}" if folder else f"{SCALE}{last}"


def _as_int8(name: str, array: Array) -> dict[str, Array]:
    """Whole numbers and their scales; arrays without input axis, such as biases, stay."""
    if array.ndim < 2 or not name.endswith("kernel"):
        return {name: array}
    # [..., in, out], before which lie axes of experts; of a convolution's [h, w, in, out] all but
    # the last lead into one output.
    axes = (0, 1, 2) if array.ndim == 4 else (-2,)
    largest = jnp.max(jnp.abs(array), axis=axes, keepdims=True)
    # A channel of zeros has no scale of its own.
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0).astype(jnp.float32)
    whole = jnp.clip(jnp.round(array / scale), -LARGEST, LARGEST).astype(jnp.int8)
    return {name: whole, _scale_name(name): scale}


def _as_bfloat16(name: str, array: Array) -> dict[str, Array]:
    return {name: array.astype(jnp.bfloat16)}


ROUNDED: dict[str, Callable[[str, Array], dict[str, Array]]] = {
    "bfloat16": _as_bfloat16,
    "int8": _as_int8,
}


def described(path: TaskPath, exact: TaskPath, kind: str) -> dict[str, Any]:
    """What was rounded, and how far the arrays moved, as a certificate says it.

    exact: the path before it.
    """
    now, before = restored(path.weights), exact.weights
    moved = {n: float(jnp.max(jnp.abs(now[n] - w))) for n, w in before.items() if w.size}
    largest = {n: float(jnp.max(jnp.abs(w))) for n, w in before.items() if w.size}
    shares = [moved[n] / largest[n] for n in moved if largest[n] > 0]
    return {
        "type": kind,
        "rounded_arrays": sum(path.weights[n].dtype != w.dtype for n, w in before.items()),
        "arrays": len(before),
        "bytes_before": sum(int(w.nbytes) for w in jax.device_get(before).values()),
        "largest_rounding": float(np.max(shares, initial=0.0)),
    }
