"""Adapters of tasks behind a frozen sub-layer, and attention over what they give (AdapterFusion).

Pfeiffer, Kamath, Rückle, Cho, Gurevych: "AdapterFusion: Non-Destructive Task Composition for
Transfer Learning", EACL 2021, arXiv:2005.00247, section 3.2. With h what the sub-layer gives, and
z_j what the adapter of task j makes of it,

    s = softmax_j(h Q . z_j K),    y = h + sum_j s_j z_j V

so the sub-layer asks, and adapters answer by their outputs. Q, K, V [D, D] of each layer's own are
all that is trained; V begins as the identity and is kept near it by a loss.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.context import Context
from moezoo.nn.domain_adapters import DomainAdapters, beside, domain_record, weights_of
from moezoo.nn.layers import Linear, fan_in_uniform
from moezoo.nn.routers import Decision
from moezoo.nn.surgery import MixtureSize


class OneOf(nnx.Module):
    """Adapters by the task; decide: (h, context) -> weights [B, T, J]."""

    decision: ClassVar[Decision] = "task"
    depends_on_task: ClassVar[bool] = True

    def __init__(self, decide: Any):
        self.decide = decide

    def __call__(self, h_BTD: Array, z_BTJD: Array, context: Context) -> tuple[Array, Array]:
        """What leaves [B, T, D], and the weights."""
        weights_BTJ = self.decide(h_BTD, context)
        return beside(z_BTJD, h_BTD, weights_BTJ), weights_BTJ

    def weights_of(self, task: int) -> tuple[float, ...] | None:
        """The weights [J] of every token of a task."""
        return weights_of(self.decide, task)


class FusionAttention(nnx.Module):
    """Attention of a sub-layer's output over its adapters' outputs; scores in float32."""

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = False

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        begin = partial(fan_in_uniform, fan_in=width)
        self.query: Any = Linear(width, width, init=begin, rngs=rngs)
        # Without a bias, which would be the same for all adapters: the softmax takes it away.
        self.key: Any = Linear(width, width, bias=False, init=begin, rngs=rngs)
        self.value = nnx.Param(jnp.eye(width))

    def __call__(self, h_BTD: Array, z_BTJD: Array, context: Context) -> tuple[Array, Array]:
        """What leaves [B, T, D], and the weights [B, T, J]."""
        query_BTD, key_BTJD = (
            layer(x.astype(jnp.float32)) for layer, x in ((self.query, h_BTD), (self.key, z_BTJD))
        )
        # Not over the root of the width, which the paper leaves out.
        weights_BTJ = jax.nn.softmax(jnp.einsum("btd,btjd->btj", query_BTD, key_BTJD), axis=-1)
        mixed_BTD = jnp.einsum("btj,btjd->btd", weights_BTJ.astype(z_BTJD.dtype), z_BTJD)
        # Values are linear, so the mixture takes them once instead of every adapter.
        return h_BTD + mixed_BTD @ self.value.get_value().astype(mixed_BTD.dtype), weights_BTJ

    def weights_of(self, task: int) -> None:
        """None: tokens decide."""
        return None

    def from_identity(self) -> Array:
        """|I - V|^2, the squares added up."""
        value_DD = self.value.get_value()
        return jnp.sum(jnp.square(jnp.eye(value_DD.shape[0]) - value_DD))


class FusedAdapters(nnx.Module):
    """A frozen sub-layer with adapters behind it; mix: `OneOf` or `FusionAttention`."""

    def __init__(self, base: Any, adapters: DomainAdapters, mix: Any):
        self.base, self.adapters, self.mix = base, adapters, mix

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        h_BTD = self.base(x_BTD, context.within("base"))
        z_BTJD = self.adapters(h_BTD)
        y_BTD, weights_BTJ = self.mix(h_BTD, z_BTJD, context)
        context.records[context.path] = domain_record(z_BTJD, h_BTD, weights_BTJ, context)
        return y_BTD

    @property
    def mixture_size(self) -> MixtureSize:
        """Of its adapters, which are all at work."""
        return MixtureSize(self.mix.decision, self.adapters.count, self.adapters.count)

    def of_task(self, task: int) -> Any:
        """The sub-layer with the adapter of the task, or bare; itself where tokens decide."""
        weights = self.mix.weights_of(task)
        if weights is None:
            return self
        live = [j for j, weight in enumerate(weights) if weight]
        return FixedBehind(self.base, self.adapters.take(live)) if live else self.base


class FixedBehind(nnx.Module):
    """A sub-layer with adapters behind it, each with its whole share."""

    def __init__(self, base: Any, adapters: DomainAdapters):
        self.base, self.adapters = base, adapters

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        h_BTD = self.base(x_BTD, context.within("base"))
        return h_BTD + self.adapters(h_BTD).sum(-2)
