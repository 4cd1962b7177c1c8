"""Activations inside kernels: their steps one after the other, before results leave a processor.

Only steps that are cheap and that the languages below Pallas know; where an activation has others,
it is left to XLA.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.expert import Activation

# erf(x) = x P(x^2) up to |x| = 3, where it is 1 but for 2e-5: P's coefficients, lowest first,
# fitted for the least greatest error, 3.2e-5. A sixtieth of what 16-bit results are rounded by.
ERF = (
    1.1282684,
    -0.37531483,
    0.11107927,
    -0.025102811,
    0.0042354087,
    -0.00051103282,
    4.1060037e-05,
    -1.9447916e-06,
    4.0741284e-08,
)
PRIMITIVES = frozenset(
    ("abs", "add", "clamp", "convert_element_type", "div", "erf", "exp", "integer_pow", "logistic")
    + ("lt", "max", "min", "mul", "neg", "select_n", "square", "sub", "tanh")
)
CALLS = ("call_jaxpr", "jaxpr")  # where functions inside functions keep their own steps


def _erf(x: Array) -> Array:
    x = jnp.clip(x, -3.0, 3.0)
    square, total = x * x, jnp.full_like(x, ERF[-1])
    for coefficient in ERF[-2::-1]:
        total = total * square + coefficient
    return x * total


def _inner(eqn: Any) -> Any:
    """The steps of a function that this step calls, or None."""
    return next((eqn.params[name] for name in CALLS if name in eqn.params), None)


def _plain(jaxpr: Any) -> bool:
    """Whether all steps are known to be cheap and to have a form in these kernels."""
    for eqn in jaxpr.eqns:
        inner = _inner(eqn)
        if not (_plain(inner.jaxpr) if inner is not None else eqn.primitive.name in PRIMITIVES):
            return False
    return True


def evaluated(closed: Any, *values: Any) -> Any:
    """What the steps make of values, erf by its polynomial; a list."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, values, strict=True))
    for eqn in jaxpr.eqns:
        given = [v.val if hasattr(v, "val") else known[v] for v in eqn.invars]
        inner = _inner(eqn)
        if inner is not None:
            made = evaluated(inner, *given)
        elif eqn.primitive.name == "erf":
            made = [_erf(given[0])]
        else:
            made = eqn.primitive.bind(*given, **eqn.params)
            made = made if eqn.primitive.multiple_results else [made]
        known |= dict(zip(eqn.outvars, made, strict=True))
    return [v.val if hasattr(v, "val") else known[v] for v in jaxpr.outvars]


def applied(activation: Activation, value: Array) -> Array:
    """The activation of float32, for use inside a kernel."""
    return evaluated(steps(activation, value.shape), value)[0]


def fuses(activation: Activation) -> bool:
    """Whether an activation can be computed inside a kernel."""
    return _plain(steps(activation, (8, 8)).jaxpr)


def steps(activation: Activation, shape: tuple[int, ...]) -> Any:
    """An activation's steps on float32 of this shape."""
    return jax.make_jaxpr(activation)(jax.ShapeDtypeStruct(shape, jnp.float32))
