"""Stacked experts: parameters with a leading axis E, and the function of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.layers import Activation, Init, fan_in_uniform, gelu, trunc_normal
from moezoo.ops.expert import ExpertFn, ExpertLinear, Params, count_experts


class Experts(Protocol):
    """What `moe.MoE` asks of experts: one expert's function and everybody's parameters."""

    @property
    def fn(self) -> ExpertFn: ...

    @property
    def hidden(self) -> int | None:
        """Features inside one expert; None where it is one linear map."""
        ...

    def stacked(self) -> Params: ...


def tiny_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform in +-1/sqrt(in * out): the reference's accident on its stacked [E, out, in].

    A fresh layer of width 384 then gives 3e-4 of its input's size: nearly dead experts.
    """
    return fan_in_uniform(key, shape, fan_in=shape[-2] * shape[-1])


def one_start(init: Init) -> Init:
    """`init` for one expert, copied to all: V-MoE's published configurations start like this.

    Only the router then tells experts apart.
    """
    return lambda key, shape: jnp.broadcast_to(init(key, shape[1:]), shape)


# Functions are part of a definition: cached, so that equal experts have equal definitions.
@cache
def mlp_of(activation: Activation) -> ExpertFn:
    """Two linear layers with `activation` between them."""

    def mlp(params: Params, x: Array, linear: ExpertLinear) -> Array:
        fc1, fc2 = params["fc1"], params["fc2"]
        hidden = linear(x, fc1["kernel"], fc1["bias"], activation)
        return linear(hidden, fc2["kernel"], fc2["bias"])

    return mlp


class StackedLinear(nnx.Module):
    """E linear maps; kernel [E, in, out], bias [E, out], each begun as one layer."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, init: Init, rngs: nnx.Rngs):
        self.kernel = nnx.Param(init(rngs.params(), (experts, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((experts, outputs)))


class Stack(nnx.Module):
    """Modules whose every parameter has a leading axis E; they compute in `dtype`.

    last: the linear map that gives an expert's output, so that a factor of it is one of the expert;
    None where there is no single one.
    """

    last: ClassVar[str | None] = None

    def __init__(self, dtype: Any):
        self.dtype = dtype

    @property
    def count(self) -> int:
        """E."""
        return count_experts(self._arrays())

    def stacked(self) -> Params:
        """All parameters in `dtype`, as the attributes' names nest them."""
        return jax.tree.map(lambda a: a.astype(self.dtype), self._arrays())

    def _arrays(self) -> Params:
        """The parameters; those of a model that was frozen (`injection.freeze`) are statistics."""
        parts = module.split(self)
        return parts.params or parts.stats

    def take(self, indices: Sequence[int]) -> Self:
        """Those at `indices`, in that order, as a new smaller module."""
        parts = module.split(self)
        index = jnp.asarray(indices, jnp.int32)
        # A frozen model's stacks are among the statistics.
        trees = (jax.tree.map(lambda a: a[index], tree) for tree in (parts.params, parts.stats))
        return module.merge(parts.definition, *trees)

    def more(self, count: int, *, init: Init = trunc_normal, rngs: nnx.Rngs) -> Self:
        """These and behind them `count` fresh ones, as a new larger module."""
        parts = module.split(self)

        def longer(path: Any, stack: Array) -> Array:
            shape = (count, *stack.shape[1:])
            matrices = path[-1].key == "kernel"
            # Biases start from 0, as in fresh experts.
            fresh = init(rngs.params(), shape) if matrices else jnp.zeros(shape, stack.dtype)
            return jnp.concatenate([stack, fresh])

        params = jax.tree_util.tree_map_with_path(longer, parts.params)
        return module.merge(parts.definition, params, parts.stats)


class MLPExperts(Stack):
    """E two-layer MLPs D -> F -> D with biases: fc1 [E, D, F] and [E, F], fc2 [E, F, D] and [E, D].

    `init(key, (E, in, out))` makes the matrices, each as if it were one layer's, `out_init` those
    of fc2 where it is given; `activation` stands between the layers. Raises UserError without a
    hidden unit or without an expert.
    """

    last: ClassVar[str | None] = "fc2"

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        activation: Activation = gelu,
        dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        out_init: Init | None = None,
        rngs: nnx.Rngs,
    ):
        check_sizes(experts, hidden)
        super().__init__(dtype)
        self.fc1 = StackedLinear(experts, width, hidden, init=init, rngs=rngs)
        self.fc2 = StackedLinear(experts, hidden, width, init=out_init or init, rngs=rngs)
        self.activation = activation

    @property
    def fn(self) -> ExpertFn:
        return mlp_of(self.activation)

    @property
    def hidden(self) -> int:
        """F."""
        return self.fc1.kernel.shape[2]


def gated_mlp(params: Params, x: Array, linear: ExpertLinear) -> Array:
    """down(silu(gate x) * up x), without biases: SwiGLU (Shazeer, arXiv:2002.05202, eq. 6)."""
    gate, up = params["gate"]["kernel"], params["up"]["kernel"]
    hidden = linear(x, gate, activation=jax.nn.silu, up=up)
    return linear(hidden, params["down"]["kernel"])


class StackedKernel(nnx.Module):
    """E matrices without a bias; kernel [E, in, out]."""

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        *,
        init: Init,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel = init(rngs.params(), (experts, inputs, outputs))
        self.kernel = nnx.Param(kernel.astype(param_dtype))


class GatedMLPExperts(Stack):
    """E gated MLPs without biases, as in Llama and Mixtral: gate and up [E, D, F], down [E, F, D].

    Raises UserError without a hidden unit or without an expert.
    """

    last: ClassVar[str | None] = "down"

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        check_sizes(experts, hidden)
        super().__init__(dtype)
        common: dict[str, Any] = {"init": init, "param_dtype": param_dtype, "rngs": rngs}
        self.gate = StackedKernel(experts, width, hidden, **common)
        self.up = StackedKernel(experts, width, hidden, **common)
        self.down = StackedKernel(experts, hidden, width, **common)

    @property
    def fn(self) -> ExpertFn:
        return gated_mlp

    @property
    def hidden(self) -> int:
        """F."""
        return self.gate.kernel.shape[2]


def check_sizes(experts: int, hidden: int) -> None:
    """Raises UserError without a hidden unit or without an expert."""
    if experts < 1 or hidden < 1:
        raise UserError(
            f"{experts} experts with {hidden} hidden units: both must be at least 1 "
            "(experts, expert_hidden)."
        )
