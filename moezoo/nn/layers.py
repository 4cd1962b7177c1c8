"""Dense layers and normalisations.

Parameters are float32 where no `param_dtype` says otherwise; `dtype` is the type of the
computation. Normalisations work in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.ops.expert import Activation

Init = Callable[[Array, tuple[int, ...]], Array]


def trunc_normal(key: Array, shape: tuple[int, ...], std: float = 0.02) -> Array:
    """Normal of standard deviation `std` (before cutting at two of them), float32."""
    return std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)


def normal(key: Array, shape: tuple[int, ...], std: float = 0.02) -> Array:
    """Normal of standard deviation `std`, what language models start from, float32."""
    return std * jax.random.normal(key, shape, jnp.float32)


def fan_in_uniform(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """Uniform in +-1/sqrt(fan_in), what PyTorch's layers start from, float32."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def gelu(x: Array) -> Array:
    """The exact (error function) GELU that DeiT and ViT weights were trained with.

    In float32, by erf as PyTorch does it: `jax.nn.gelu` takes erfc, which costs a CPU 2.5 times
    as much.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def tanh_gelu(x: Array) -> Array:
    """The tanh approximation of GELU, Flax's default: what V-MoE and big_vision trained with."""
    return jax.nn.gelu(x, approximate=True)


def zeros(key: Array, shape: tuple[int, ...]) -> Array:
    """Zeros, float32, as an initialiser."""
    return jnp.zeros(shape, jnp.float32)


class Linear(nnx.Module):
    """y = x W + b with kernel [in, out]; without a bias there is no such parameter."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs)).astype(param_dtype))
        self.bias: Any = nnx.Param(jnp.zeros((outputs,), param_dtype)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Array) -> Array:
        y = x.astype(self.dtype) @ self.kernel.get_value().astype(self.dtype)
        return y if self.bias is None else y + self.bias.get_value().astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalises the last axis in float32; the result has the type of the input."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        y = standardised(x, self.epsilon)
        return (y * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


class ScaleNorm(nnx.Module):
    """`LayerNorm` without a bias, for queries and keys."""

    def __init__(self, width: int, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,)))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        return (standardised(x, self.epsilon) * self.scale.get_value()).astype(x.dtype)


class RMSNorm(nnx.Module):
    """The last axis over its root mean square in float32; the result has the type of the input.

    Zhang and Sennrich, arXiv:1910.07467, eq. 4.
    """

    def __init__(self, width: int, epsilon: float = 1e-6, param_dtype: Any = jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        # Rounded once, behind the scale; transformers rounds in front of it as well.
        return (y * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


def standardised(x: Array, epsilon: float) -> Array:
    """The last axis with mean 0 and variance 1, float32."""
    y = x.astype(jnp.float32)
    # Mean first, then the squares around it: a difference of mean squares would cancel.
    y = y - y.mean(-1, keepdims=True)
    return y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + epsilon)


class MLP(nnx.Module):
    """Two linear layers with a GELU between them, or another `activation`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = gelu,
        dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        self.fc1: Any = Linear(width, hidden, dtype=dtype, init=init, rngs=rngs)
        self.fc2: Any = Linear(hidden, width, dtype=dtype, init=init, rngs=rngs)
        self.activation = activation

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


def drop_path(x: Array, rate: float, key: Array | None) -> Array:
    """Set a residual branch to 0 for whole examples with probability `rate`, rescale the others.

    Without a key nothing is dropped. Stochastic depth (Huang et al., arXiv:1603.09382).
    """
    if key is None or rate == 0.0:
        return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    kept = jax.random.bernoulli(key, 1.0 - rate, shape)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))
