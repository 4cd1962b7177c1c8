"""Adapters of domains beside a frozen MLP, which is one of the choices itself (MixDA).

Diao, Xu, Xu, Wang, Zhang: "Mixture-of-Domain-Adapters: Decoupling and Injecting Domain Knowledge to
Pre-trained Language Models Memories", ACL 2023, arXiv:2306.05406. An adapter of domain j reads the
hidden units h of a feed-forward network W_out h and gives D_j = U_j gelu(V_j h). What leaves is a
convex mixture, in which the network itself, the last expert, has a share as well:

    y = sum_j w_j D_j(h) + w_{J+1} W_out h        w = softmax(g(h))

g is a deep MLP. As published it reads the last position of a text, so a text has one decision, and
all its positions see what comes last; a causal decoder cannot do that, so there each token's own h
decides (`READS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn import module
from moezoo.nn.context import Context, apply_linear, task_of_tokens
from moezoo.nn.layers import Linear, fan_in_uniform, gelu
from moezoo.nn.lowrank import dropped
from moezoo.nn.routers import Decision
from moezoo.nn.surgery import MixtureSize
from moezoo.ops.routing import Routing

GATE_LAYERS = 4  # of MixDA's gate


class DomainRecord(NamedTuple):
    """A `moe.Record` of such a mixture; every token has all experts, in MixDA the MLP as the last.

    imitation_N: mean squared difference of the adapters' outputs from the MLP's, float32.
    """

    routing: Routing
    task_N: Array
    dropped: Array
    imitation_N: Array


class DomainAdapters(nnx.Module):
    """J bottlenecks from F hidden units to D features, stacked.

    down [J, F, M] begins as PyTorch's linear layers do, up [J, M, D] with zeros.
    """

    def __init__(
        self, domains: int, inputs: int, hidden: int, width: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        begin = partial(fan_in_uniform, fan_in=inputs)
        self.down = nnx.Param(begin(rngs.params(), (domains, inputs, hidden)))
        self.down_bias = nnx.Param(jnp.zeros((domains, hidden)))
        self.up = nnx.Param(jnp.zeros((domains, hidden, width)))
        self.up_bias = nnx.Param(jnp.zeros((domains, width)))
        self.dtype = dtype

    def __call__(self, h_BTF: Array) -> Array:
        """What every adapter gives, [B, T, J, D]."""
        down, low, up, high = (
            p.get_value().astype(self.dtype)
            for p in (self.down, self.down_bias, self.up, self.up_bias)
        )
        x = gelu(jnp.einsum("btf,jfm->btjm", h_BTF.astype(self.dtype), down) + low)
        return jnp.einsum("btjm,jmd->btjd", x, up) + high

    @property
    def count(self) -> int:
        """J."""
        return self.down.get_value().shape[0]

    def take(self, indices: Sequence[int]) -> Self:
        """Those at `indices`, in that order, as a new smaller module."""
        parts, index = module.split(self), jnp.asarray(indices, jnp.int32)
        trees = (jax.tree.map(lambda a: a[index], tree) for tree in (parts.params, parts.stats))
        return module.merge(parts.definition, *trees)


def each_token(h_BTF: Array) -> Array:
    """Every token decides for itself."""
    return h_BTF


def last_position(h_BTF: Array) -> Array:
    """The last position decides for all of the text, as published; a pad token, where there is."""
    return h_BTF[:, -1:]


READS: dict[str, Callable[[Array], Array]] = {"token": each_token, "last": last_position}


class MLPGate(nnx.Module):
    """softmax of linear layers with ReLU between them, float32; dropout in front of each."""

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = False

    def __init__(
        self,
        inputs: int,
        hidden: int,
        experts: int,
        *,
        layers: int = GATE_LAYERS,
        reads: str = "token",
        dropout: float = 0.2,
        rngs: nnx.Rngs,
    ):
        sizes = [inputs, *[hidden] * (layers - 1), experts]
        self.layers = nnx.List(
            [
                Linear(a, b, init=partial(fan_in_uniform, fan_in=a), rngs=rngs)
                for a, b in zip(sizes[:-1], sizes[1:], strict=True)
            ]
        )
        self.reads, self.dropout = reads, dropout

    def __call__(self, h_BTF: Array, context: Context) -> Array:
        """Weights [B, T, E], or [B, 1, E] where one decision is a text's."""
        x = READS[self.reads](h_BTF).astype(jnp.float32)
        key = context.key if context.train else None
        for i, layer in enumerate(self.layers):
            x = dropped(x, self.dropout, None if key is None else jax.random.fold_in(key, i))
            x = layer(jax.nn.relu(x) if i else x)
        return jax.nn.softmax(x, axis=-1)


class DomainTable(nnx.Module):
    """Weights by the domain of a token's task: domain 0 is everything else and has the MLP alone.

    In the first stage, where the domain is known: its adapter and the MLP have half each.
    """

    decision: ClassVar[Decision] = "task"
    depends_on_task: ClassVar[bool] = True

    def __init__(self, domain_of_task: Sequence[int], domains: int):
        self.domain_of_task, self.domains = tuple(domain_of_task), domains

    def __call__(self, h_BTF: Array, context: Context) -> Array:
        """Weights [B, T, E]; tasks that the table lacks are domain 0."""
        b, t = h_BTF.shape[:2]
        domain_BT = self.of_tokens(task_of_tokens(context, b * t)).reshape(b, t)
        own_BTJ = jax.nn.one_hot(domain_BT - 1, self.domains)
        half_BT1 = 0.5 * (domain_BT > 0)[..., None]
        return jnp.concatenate([0.5 * own_BTJ, 1.0 - half_BT1], axis=-1)

    def of_tokens(self, task_N: Array) -> Array:
        """The domain of each token."""
        table = jnp.asarray(self.domain_of_task, jnp.int32)
        known_N = task_N < table.size
        return jnp.where(known_N, table[jnp.minimum(task_N, table.size - 1)], 0)


class OwnAdapter(nnx.Module):
    """Every token has the adapter of its task alone; one whose task has none has no adapter."""

    decision: ClassVar[Decision] = "task"
    depends_on_task: ClassVar[bool] = True

    def __init__(self, tasks: int):
        self.tasks = tasks

    def __call__(self, h_BTF: Array, context: Context) -> Array:
        """Weights [B, T, J]."""
        b, t = h_BTF.shape[:2]
        return jax.nn.one_hot(task_of_tokens(context, b * t), self.tasks).reshape(b, t, -1)


def convex(outputs_BTJD: Array, own_BTD: Array, weights_BTE: Array) -> Array:
    """sum_j w_j D_j + w_{J+1} F; axes of size 1 are for all tokens."""
    weights = weights_BTE.astype(own_BTD.dtype)
    mixed = jnp.sum(weights[..., :-1, None] * outputs_BTJD, axis=-2)
    return mixed + weights[..., -1:] * own_BTD


def beside(outputs_BTJD: Array, own_BTD: Array, weights_BTJ: Array) -> Array:
    """sum_j w_j D_j + F: the network keeps its whole share."""
    weights = weights_BTJ.astype(own_BTD.dtype)
    return jnp.sum(weights[..., None] * outputs_BTJD, axis=-2) + own_BTD


# (adapters' outputs, the MLP's, weights) -> what leaves
Blend = Callable[[Array, Array, Array], Array]


class DomainMixture(nnx.Module):
    """A frozen gated MLP with adapters of domains; `base` has `inner` and `down`.

    decide: `MLPGate` or `DomainTable`, with as many weights as `combine` takes.
    """

    def __init__(self, base: Any, adapters: DomainAdapters, decide: Any, combine: Blend = convex):
        self.base, self.adapters, self.decide, self.combine = base, adapters, decide, combine

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        within = context.within("base")
        h_BTF = self.base.inner(x_BTD, within)
        own_BTD = apply_linear(self.base.down, h_BTF, within, "down")
        outputs_BTJD, weights_BTE = self.adapters(h_BTF), self.decide(h_BTF, context)
        context.records[context.path] = domain_record(outputs_BTJD, own_BTD, weights_BTE, context)
        return self.combine(outputs_BTJD, own_BTD, weights_BTE)

    @property
    def mixture_size(self) -> MixtureSize:
        """Of its adapters, which are all at work."""
        return MixtureSize(self.decide.decision, self.adapters.count, self.adapters.count)

    def of_task(self, task: int) -> Any:
        """The MLP with the adapters that the task has, or bare; itself where tokens decide."""
        weights = weights_of(self.decide, task)
        if weights is None:
            return self
        live = [j for j in range(self.adapters.count) if weights[j]]
        if not live:
            return self.base
        left = tuple(weights[j] for j in (*live, *range(self.adapters.count, len(weights))))
        return FixedBeside(self.base, self.adapters.take(live), left, self.combine)


class FixedBeside(nnx.Module):
    """What a `DomainMixture` is where its weights are constants."""

    def __init__(
        self, base: Any, adapters: DomainAdapters, weights: tuple[float, ...], combine: Blend
    ):
        self.base, self.adapters, self.weights, self.combine = base, adapters, weights, combine

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        within = context.within("base")
        h_BTF = self.base.inner(x_BTD, within)
        own_BTD = apply_linear(self.base.down, h_BTF, within, "down")
        return self.combine(self.adapters(h_BTF), own_BTD, jnp.asarray([[self.weights]]))


def weights_of(decide: Any, task: int) -> tuple[float, ...] | None:
    """The weights [E] of every token of a task; None where tokens decide."""
    if decide.decision != "task":
        return None
    weights_11E = decide(jnp.zeros((1, 1, 1)), Context(task))
    return tuple(float(w) for w in weights_11E[0, 0])


def domain_record(
    outputs_BTJD: Array, own_BTD: Array, weights_BTE: Array, context: Context
) -> DomainRecord:
    """What the mixture did, as every loss and statistic reads it."""
    b, t = own_BTD.shape[:2]
    n, e = b * t, weights_BTE.shape[-1]
    shares_NE = jnp.broadcast_to(weights_BTE, (b, t, e)).reshape(n, e).astype(jnp.float32)
    whole_BT = jnp.ones((b, t), bool) if context.mask_BT is None else context.mask_BT
    mask_N = whole_BT.reshape(n)
    shares_NE = jnp.where(mask_N[:, None], shares_NE, 0.0)
    experts_NK = jnp.where(mask_N[:, None], jnp.arange(e, dtype=jnp.int32), -1)
    logits_NE = jnp.log(jnp.maximum(shares_NE, 1e-9))
    logits_NE = jnp.where(mask_N[:, None], logits_NE, 0.0)
    still = jnp.zeros_like(logits_NE)
    routing = Routing(experts_NK, shares_NE, shares_NE, logits_NE, logits_NE, still, mask_N=mask_N)
    apart = outputs_BTJD.astype(jnp.float32) - own_BTD[..., None, :].astype(jnp.float32)
    imitation_N = jnp.square(apart).mean((-1, -2)).reshape(n)
    task_N = task_of_tokens(context, n)
    return DomainRecord(routing, task_N, jnp.zeros((), jnp.int32), imitation_N)


class TaskAdapter(nnx.Module):
    """y + U silu(D y) behind a sub-layer (Pfeiffer et al., arXiv:2005.00247)."""

    def __init__(self, base: Any, adapter: nnx.Module):
        self.base, self.adapter = base, adapter

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        y_BTD = self.base(x_BTD, context.within("base"))
        adapter: Any = self.adapter
        return y_BTD + adapter(y_BTD)
