"""Products that decide something: exact in float32, whatever units a device multiplies with.

Logits decide indices, so matrix units must not round their inputs. Asked for the highest precision,
a GPU multiplies float32 on its slow units or in six passes. Rows in bfloat16 need three: a float32
number is the sum of three bfloat16 numbers, and a product of two bfloat16 numbers is exact in
float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.expert import platform

# Logits decide indices, so matrix units must not round their inputs to bfloat16.
EXACT = lax.Precision.HIGHEST


def exact_product(x_ND: Array, kernel_DE: Array) -> Array:
    """x times the kernel, float32 [N, E]. x: any type; kernel: float32."""
    rows = x_ND.dtype == jnp.bfloat16 and x_ND.ndim == kernel_DE.ndim == 2
    if rows and platform() == "gpu":
        return by_parts(x_ND, kernel_DE)
    return jnp.matmul(x_ND.astype(jnp.float32), kernel_DE, precision=EXACT)


def parts(array: Array) -> tuple[Array, Array, Array]:
    """Three bfloat16 arrays whose sum is a float32 array, largest first."""
    found = []
    for _ in range(3):
        # Not a conversion there and back, which compilers may leave out.
        rounded = lax.reduce_precision(array, exponent_bits=8, mantissa_bits=7)
        found.append(rounded.astype(jnp.bfloat16))
        array = array - rounded
    return found[0], found[1], found[2]


def _dot(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.float32)


@jax.custom_vjp
def by_parts(x_ND: Array, kernel_DE: Array) -> Array:
    """The same in three passes over bfloat16 rows."""
    y_NX = _dot(x_ND, jnp.concatenate(parts(kernel_DE), axis=1))
    large, middle, small = jnp.split(y_NX, 3, axis=1)
    return large + (middle + small)


def _forward(x_ND: Array, kernel_DE: Array) -> Any:
    return by_parts(x_ND, kernel_DE), (x_ND, kernel_DE)


def _backward(saved: Any, dy_NE: Array) -> tuple[Array, Array]:
    x_ND, kernel_DE = saved
    dkernel_DX = _dot(x_ND.T, jnp.concatenate(parts(dy_NE), axis=1))
    large, middle, small = jnp.split(dkernel_DX, 3, axis=1)
    # The rows' derivative is rounded to bfloat16 in the end: products of small parts do not count.
    (dy, dy_rest, _), (w, w_rest, _) = parts(dy_NE), parts(kernel_DE)
    dx_ND = _dot(
        jnp.concatenate([dy, dy, dy_rest], axis=1), jnp.concatenate([w, w_rest, w], axis=1).T
    )
    return dx_ND.astype(x_ND.dtype), large + (middle + small)


by_parts.defvjp(_forward, _backward)
