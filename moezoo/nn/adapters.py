"""Adapters: small modules that are trained beside the frozen layers of a transformer.

Bottleneck (Houlsby et al., arXiv:1902.00751), Convpass (Jie and Deng, arXiv:2207.07039) and the
conformer's convolution module (Cappellazzo et al., arXiv:2312.03694). None has a residual or a
scale of its own (`nn.injection`). A fresh adapter gives 0 and trains: its last layer starts from 0,
the others do not. Convolutions run along the sequence of tokens as it is, whatever its tokens mean.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moezoo.errors import UserError
from moezoo.nn.context import Context, LayerOutput
from moezoo.nn.conv import BatchNorm
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import (
    MLP,
    Activation,
    Init,
    LayerNorm,
    Linear,
    fan_in_uniform,
    gelu,
    trunc_normal,
    zeros,
)
from moezoo.nn.lowrank import dropped


class Start(NamedTuple):
    """What the matrices into and out of the bottleneck start from; biases start from 0."""

    down: Init
    up: Init


STARTS = {
    "identity": Start(trunc_normal, zeros),
    # What transformers 4.28 makes of every linear layer that is missing in a checkpoint.
    "fast_init": Start(trunc_normal, trunc_normal),
    # What the published constructors write: only the last bias ever gets a gradient.
    "zero_init": Start(zeros, zeros),
}


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def double_quick_gelu(x: Array) -> Array:
    """The activation twice: what is left of the published Convpass, which drops its convolution."""
    return quick_gelu(quick_gelu(x))


def check_bottleneck(hidden: int) -> None:
    """Raise UserError for an adapter without a hidden unit."""
    if hidden < 1:
        raise UserError(f"bottleneck is {hidden}; an adapter needs at least 1 hidden unit.")


class Bottleneck(MLP):
    """U gelu(D x + c) + e, or with another `activation`."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: Activation = gelu,
        start: Start = STARTS["identity"],
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_bottleneck(hidden)
        self.fc1 = Linear(width, hidden, dtype=dtype, init=start.down, rngs=rngs)
        self.fc2 = Linear(hidden, width, dtype=dtype, init=start.up, rngs=rngs)
        self.activation = activation


class ScaledAdapter(Bottleneck):
    """scale * (U relu(D x + c) + e) with dropout before U (AdaptFormer, arXiv:2205.13535).

    D begins as PyTorch's linear layers do, U with zeros.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        scale: float = 0.1,
        dropout: float = 0.1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        start = Start(partial(fan_in_uniform, fan_in=width), zeros)
        super().__init__(width, hidden, activation=jax.nn.relu, start=start, dtype=dtype, rngs=rngs)
        self.scale, self.dropout = scale, dropout

    def __call__(self, x: Array, key: Array | None = None) -> Array:  # type: ignore[override]
        """x [..., D]; dropout acts with a key."""
        hidden = dropped(self.activation(self.fc1(x)), self.dropout, key)
        return self.scale * self.fc2(hidden)


def bottleneck_experts(
    experts: int,
    width: int,
    hidden: int,
    *,
    start: Start = STARTS["identity"],
    rngs: nnx.Rngs,
    **options: Any,
) -> MLPExperts:
    """E bottlenecks, stacked. Options are those of `MLPExperts`."""
    check_bottleneck(hidden)
    inits: dict[str, Any] = {"init": start.down, "out_init": start.up}
    return MLPExperts(experts, width, hidden, rngs=rngs, **inits, **options)


class TokenConv(nnx.Module):
    """Convolution along the tokens, as many out as in; kernel [k, C / groups, C].

    An even kernel reaches one token further to the right, as PyTorch's "same".
    """

    def __init__(self, kernel: Array, *, groups: int = 1, dtype: Any = jnp.float32):
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(jnp.zeros((kernel.shape[-1],)))
        self.groups, self.dtype = groups, dtype

    def __call__(self, x_BTC: Array) -> Array:
        kernel = self.kernel.get_value().astype(self.dtype)
        before = (kernel.shape[0] - 1) // 2
        y = lax.conv_general_dilated(
            x_BTC.astype(self.dtype),
            kernel,
            window_strides=(1,),
            padding=[(before, kernel.shape[0] - 1 - before)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return y + self.bias.get_value().astype(self.dtype)


def hidden_tokens(x_BTC: Array, context: Context) -> Array:
    """0 where there is padding, which a convolution would mix into its neighbours."""
    if context.mask_BT is None:
        return x_BTC
    return jnp.where(context.mask_BT[..., None], x_BTC, jnp.zeros((), x_BTC.dtype))


def xavier(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform in +-sqrt(6 / (fan in + fan out)) for a kernel [k, in, out]."""
    return jax.nn.initializers.xavier_uniform()(key, shape, jnp.float32)


class Convpass(nnx.Module):
    """U q(conv(q(D x))) with q = QuickGELU, a convolution over three tokens, and dropout before U.

    Dropout acts in training.
    """

    wants_context: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        start: Start = STARTS["identity"],
        dropout: float = 0.1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_bottleneck(hidden)
        self.down = Linear(width, hidden, dtype=dtype, init=start.down, rngs=rngs)
        self.conv = TokenConv(xavier(rngs.params(), (3, hidden, hidden)), dtype=dtype)
        self.up = Linear(hidden, width, dtype=dtype, init=start.up, rngs=rngs)
        self.dropout = dropout

    def between(self, x_BTC: Array, context: Context) -> Array:
        """What stands between the linear layers after the first activation."""
        return quick_gelu(self.conv(hidden_tokens(x_BTC, context)))

    def __call__(self, x_BTD: Array, context: Context) -> LayerOutput:
        x_BTC = self.between(quick_gelu(self.down(x_BTD)), context)
        key = context.key if context.train else None
        return LayerOutput(self.up(dropped(x_BTC, self.dropout, key)))


class UnusedConvpass(Convpass):
    """As published: the convolution is there, its result is not; the activation acts twice."""

    def between(self, x_BTC: Array, context: Context) -> Array:
        return quick_gelu(x_BTC)


class Conformer(nnx.Module):
    """LayerNorm, gated linear units, a depthwise convolution of `kernel` tokens, batch norm, SiLU.

    The convolution module of the conformer (Gulati et al., arXiv:2005.08100, section 2.2). The
    batch's statistics count every token, padding as well.
    """

    wants_context: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        kernel: int = 31,
        start: Start = STARTS["identity"],
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_bottleneck(hidden)
        if kernel < 1:
            raise UserError(f"kernel is {kernel}; a convolution needs at least 1 token.")
        self.norm = LayerNorm(width, 1e-5)  # PyTorch's epsilon; the trunk has its own
        down = partial(fan_in_uniform, fan_in=width)
        self.down = Linear(width, 2 * hidden, dtype=dtype, init=down, rngs=rngs)
        # Depthwise: each output has one input channel.
        taps = fan_in_uniform(rngs.params(), (kernel, 1, hidden), fan_in=kernel)
        self.conv = TokenConv(taps, groups=hidden, dtype=dtype)
        self.batch_norm = BatchNorm(hidden)
        self.up = Linear(hidden, width, dtype=dtype, init=start.up, rngs=rngs)

    def seen(self, x_BTD: Array) -> Array:
        """What the first linear layer sees."""
        return self.norm(x_BTD)

    def __call__(self, x_BTD: Array, context: Context) -> LayerOutput:
        # PyTorch's order of halves in GLU: the value first.
        value, gate = jnp.split(self.down(self.seen(x_BTD)), 2, axis=-1)
        x_BTC = self.conv(hidden_tokens(value * jax.nn.sigmoid(gate), context))
        # As maps of height 1, which `BatchNorm` reads.
        x_BTC = self.batch_norm(x_BTC[:, None], context.train)[:, 0]
        return LayerOutput(self.up(jax.nn.silu(x_BTC)))


class NormlessConformer(Conformer):
    """As published: the LayerNorm is there, its result is not."""

    def seen(self, x_BTD: Array) -> Array:
        return x_BTD
