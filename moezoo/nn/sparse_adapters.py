"""Sparse adapters, one drawn for a pass in training, that are one adapter afterwards (MoSA).

Zhang et al., "MoSA: Mixture of Sparse Adapters for Visual Efficient Tuning", arXiv:2312.02923. An
adapter's matrices are split at random into E disjoint sets of entries. Expert e trains its set and
has everywhere else what all began with, so E experts are one matrix and the number of each entry's
owner: no copies are kept. Biases belong to everybody and have copies.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.adapters import ScaledAdapter, check_bottleneck
from moezoo.nn.injection import Frozen
from moezoo.nn.layers import Init, fan_in_uniform, zeros
from moezoo.nn.lowrank import dropped
from moezoo.nn.surgery import MixtureSize
from moezoo.ops import sparse_masks


class SplitLinear(nnx.Module):
    """E sparse versions of a linear layer: kernel [in, out], owner int32 [in, out], bias [E, out].

    start: what all began with; not kept where that is 0 everywhere.
    """

    def __init__(
        self, inputs: int, outputs: int, experts: int, *, init: Init, dtype: Any, rngs: nnx.Rngs
    ):
        shape = (inputs, outputs)
        begun = init(rngs.params(), shape)
        self.kernel = nnx.Param(begun)
        self.start = None if init is zeros else Frozen(jnp.copy(begun))
        self.owner = Frozen(sparse_masks.random_owners(rngs.params(), shape, experts))
        self.bias = nnx.Param(jnp.zeros((experts, outputs)))
        self.experts, self.dtype = experts, dtype

    @property
    def begun(self) -> Array:
        """What all experts began with."""
        kernel = self.kernel.get_value()
        return jnp.zeros_like(kernel) if self.start is None else self.start.get_value()

    def __call__(self, x: Array, expert: Array) -> Array:
        """y of one expert, int32 scalar."""
        kernel, owner = self.kernel.get_value(), self.owner.get_value()
        own = sparse_masks.part(self.begun, kernel, owner, expert)
        return x.astype(self.dtype) @ own.astype(self.dtype) + self.bias[expert].astype(self.dtype)

    def merged(self, share: float) -> tuple[Array, Array]:
        """Kernel and bias of the one layer: `ops.sparse_masks.merged`, and the mean bias."""
        kernel = sparse_masks.merged(self.begun, self.kernel.get_value(), share)
        return kernel, self.bias.get_value().mean(0)


class SharedDown(nnx.Module):
    """A linear layer that all experts share; kernel [in, out], bias [out]."""

    def __init__(self, inputs: int, outputs: int, *, init: Init, dtype: Any, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,)))
        self.dtype = dtype

    def __call__(self, x: Array, expert: Array) -> Array:
        kernel, bias = self.kernel.get_value(), self.bias.get_value()
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)

    def merged(self, share: float) -> tuple[Array, Array]:
        """Itself."""
        return self.kernel.get_value(), self.bias.get_value()


class SparseAdapters(nnx.Module):
    """scale * up(relu(down x)) of one expert drawn for the pass, or of all of them merged.

    shared: "down", all experts have one dense matrix into the bottleneck, or "none". merge: "mean"
    of the experts, which is what a pass gives in expectation where `down` is shared (but for
    dropout), or their "union", E times as much.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        *,
        shared: str = "down",
        merge: str = "mean",
        scale: float = 0.1,
        dropout: float = 0.1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_bottleneck(hidden)
        into: dict[str, Any] = {"init": partial(fan_in_uniform, fan_in=width)}
        common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.down: Any = (
            SharedDown(width, hidden, **into, **common)
            if shared == "down"
            else SplitLinear(width, hidden, experts, **into, **common)
        )
        self.up = SplitLinear(hidden, width, experts, init=zeros, **common)
        self.experts, self.scale, self.dropout, self.dtype = experts, scale, dropout, dtype
        self.share = {"mean": 1 / experts, "union": 1.0}[merge]

    @property
    def mixture_size(self) -> MixtureSize:
        """One is at work, and nothing but chance says which."""
        return MixtureSize("constant", self.experts, 1)

    def __call__(self, x_BTD: Array, key: Array | None = None) -> Array:
        """With a key one expert for all of the batch, drawn for each matrix; else all merged."""
        if key is None:
            return self.merged()(x_BTD)
        draw_down, draw_up, noise = jax.random.split(key, 3)
        first = jax.random.randint(draw_down, (), 0, self.experts)
        second = jax.random.randint(draw_up, (), 0, self.experts)
        hidden = jax.nn.relu(self.down(x_BTD, first))
        return self.scale * self.up(dropped(hidden, self.dropout, noise), second)

    def merged(self) -> ScaledAdapter:
        """The one adapter, which computes what this gives without a key."""
        width, hidden = self.down.kernel.get_value().shape
        options: dict[str, Any] = {"scale": self.scale, "dropout": 0.0, "dtype": self.dtype}
        made = ScaledAdapter(width, hidden, rngs=nnx.Rngs(0), **options)
        for layer, split in ((made.fc1, self.down), (made.fc2, self.up)):
            kernel, bias = split.merged(self.share)
            layer.kernel.set_value(kernel)
            layer.bias.set_value(bias)
        return made

    def of_task(self, task: int) -> ScaledAdapter:
        """The merged adapter, whatever the task."""
        return self.merged()
