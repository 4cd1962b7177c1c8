"""Convolutions and batch normalisation, channels last."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moezoo.nn.layers import fan_in_uniform

LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv(nnx.Module):
    """Square convolution with bias; kernel [k, k, in, out], padded by (k - 1) / 2 on each side.

    The kernel starts as PyTorch's does, uniform in +-1/sqrt(fan_in); the bias starts at 0, because
    batch norm takes it out again anyway.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        fan_in = inputs * size * size
        shape = (size, size, inputs, outputs)
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), shape, fan_in))
        self.bias = nnx.Param(jnp.zeros((outputs,)))
        self.size, self.stride, self.dtype = size, stride, dtype

    def __call__(self, x_BHWC: Array) -> Array:
        kernel = self.kernel.get_value().astype(self.dtype)
        side = (self.size // 2, self.size // 2)
        y = lax.conv_general_dilated(
            x_BHWC.astype(self.dtype),
            kernel,
            window_strides=(self.stride, self.stride),
            padding=(side, side),
            dimension_numbers=LAYOUT,
        )
        return y + self.bias.get_value().astype(self.dtype)


class ConvTranspose(nnx.Module):
    """3x3 transposed convolution to twice the height and width; kernel [3, 3, in, out].

    The gradient of a convolution of stride 2 and padding 1 (PyTorch: stride 2, padding 1,
    output_padding 1). The kernel lies as a convolution over the dilated input needs it, turned by
    180 degrees against PyTorch's.
    """

    def __init__(self, inputs: int, outputs: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        fan_in = outputs * 9  # PyTorch reads the second axis of its [in, out, 3, 3]
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), (3, 3, inputs, outputs), fan_in))
        self.bias = nnx.Param(jnp.zeros((outputs,)))
        self.dtype = dtype

    def __call__(self, x_BHWC: Array) -> Array:
        y = lax.conv_general_dilated(
            x_BHWC.astype(self.dtype),
            self.kernel.get_value().astype(self.dtype),
            window_strides=(1, 1),
            # k - 1 - padding in front, behind it output_padding more.
            padding=((1, 2), (1, 2)),
            lhs_dilation=(2, 2),
            dimension_numbers=LAYOUT,
        )
        return y + self.bias.get_value().astype(self.dtype)


class BatchNorm(nnx.Module):
    """Normalises each channel over batch and space; running statistics serve evaluation.

    In training the batch's mean and biased variance normalise and the running values move by
    `momentum` towards them (the variance unbiased), as in PyTorch. Under `jax.jit` the batch is
    the global one, whatever its sharding.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, epsilon: float = 1e-5):
        self.scale = nnx.Param(jnp.ones((channels,)))
        self.bias = nnx.Param(jnp.zeros((channels,)))
        self.mean = nnx.BatchStat(jnp.zeros((channels,)))
        self.var = nnx.BatchStat(jnp.ones((channels,)))
        self.momentum, self.epsilon = momentum, epsilon

    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        mean, var = self.mean.get_value(), self.var.get_value()
        if train:
            mean, var = self._observe(x_BHWC.astype(jnp.float32))
        # One multiply and one add per element, whatever the statistics cost.
        slope = self.scale.get_value() * jax.lax.rsqrt(var + self.epsilon)
        offset = self.bias.get_value() - mean * slope
        return (x_BHWC * slope + offset).astype(x_BHWC.dtype)

    def _observe(self, x: Array) -> tuple[Array, Array]:
        count = x.size // x.shape[-1]
        mean = x.mean((0, 1, 2))
        # Around the mean: the difference of two large mean squares would cancel.
        var = jnp.square(x - mean).mean((0, 1, 2))
        # A single value has no unbiased variance: its biased one, 0, stays.
        step, unbiased = self.momentum, var * (count / max(count - 1, 1))
        running = self.mean.get_value(), self.var.get_value()
        # State, not output: the loss must not reach back through it.
        fresh = jax.lax.stop_gradient((mean, unbiased))
        self.mean.set_value(running[0] + step * (fresh[0] - running[0]))
        self.var.set_value(running[1] + step * (fresh[1] - running[1]))
        return mean, var


class ConvNorm(nnx.Module):
    """Convolution and batch normalisation, without an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(inputs, outputs, size, stride=stride, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs)

    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        return self.norm(self.conv(x_BHWC), train)


class UpConvNorm(nnx.Module):
    """Transposed convolution and batch normalisation, to twice the height and width."""

    def __init__(self, inputs: int, outputs: int, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.conv = ConvTranspose(inputs, outputs, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs)

    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        return self.norm(self.conv(x_BHWC), train)
