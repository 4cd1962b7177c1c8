"""What a router is, and the routers whose tokens choose k experts by linear maps.

A router makes a `Routing` of tokens and a context, in float32 whatever the tokens are. Its
`decision` says what pruning may promise later: "constant" (nothing decides), "task", "task_support"
(a token chooses inside its task's set), "token" (anything may happen), "row" (the other tokens of
its row matter), "batch" (all other tokens matter) or "soft".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn import module
from moezoo.nn.context import Context
from moezoo.nn.layers import Init, LayerNorm, Linear, fan_in_uniform, gelu, trunc_normal
from moezoo.nn.support import Support
from moezoo.ops.exact import EXACT, exact_product
from moezoo.ops.routing import (
    Noise,
    Routing,
    Select,
    learned_noise,
    no_noise,
    route,
    softmax_then_top_k,
    top_k_then_softmax,
)
from moezoo.ops.selection import check_learns

Decision = Literal["constant", "task", "task_support", "token", "row", "batch", "soft"]


class Router(Protocol):
    """What `moe.MoE` asks of a router; `x_ND` are B rows of T tokens each, N = B*T."""

    decision: ClassVar[Decision]
    depends_on_task: ClassVar[bool]

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing: ...


@runtime_checkable
class Decider(Protocol):
    """A part that decides which experts work: a router of a MoE layer or of another mixture."""

    decision: ClassVar[Decision]
    depends_on_task: ClassVar[bool]


class TopKRouter(nnx.Module):
    """k experts per token, chosen from [N, E] logits; kinds of router fill in the hooks.

    Raises UserError for a selection that could teach it nothing (`selection.check_learns`).
    """

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = False
    # Of the class, because Flax lets nothing that was None on a module become one that has arrays.
    support: Support | None = None

    def __init__(self, k: int, select: Select, noise: Noise):
        # Not by the number of experts: what is left of a model for one task may have a single one.
        check_learns(select, k)
        self.k, self.select, self.noise = k, select, noise

    def within(self, support: Support | None) -> Any:
        """The same router, whose tokens choose inside of a support where there is one."""
        if support is not None:
            self.support = support
            self.decision = "task_support"  # type: ignore[misc]
        return self

    def logits(self, x_ND: Array, context: Context) -> Array:
        """Clean logits, float32 [N, E]."""
        raise NotImplementedError

    def noise_for(self, x_ND: Array, context: Context) -> Noise:
        """The noise of these tokens' logits."""
        return self.noise

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        """How these tokens choose; `key` is there in training only."""
        return self.select

    def support_for(self, logits_NE: Array, context: Context) -> Array | None:
        """The experts these tokens may choose from, bool [E] or [N, E]; None = all."""
        return None if self.support is None else self.support.of(context, logits_NE.shape[0])

    def counted(self, routing: Routing, task_N: Array) -> Any:
        """What a pass shows to the state that a rule moves; None: there is no such state."""
        return None if self.support is None else self.support.counted(routing, task_N)

    def observe(self, counted: Any) -> None:
        """Move that state, once per training step, by the sum of what its passes showed."""
        if self.support is not None:
            self.support.observe(counted)

    @property
    def reach(self) -> tuple[int, ...] | None:
        """The only experts that any token can ask for, ascending; None where it can be any."""
        return None if self.support is None else self.support.reach

    def _of_task(self, task: int) -> Support | None:
        """The set of one task by itself, for the router of that task."""
        return None if self.support is None else self.support.of_task(task)

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        x_ND = without_padding(x_ND, mask_N)
        logits_NE = self.logits(x_ND, context)
        return route(
            logits_NE,
            k=self.k,
            select=self.select_for(logits_NE, key),
            noise=self.noise_for(x_ND, context),
            key=key,
            mask_N=mask_N,
            support_NE=self.support_for(logits_NE, context),
        )

    def among(self, routing: Routing, kept: Sequence[int]) -> Routing:
        """The decision of a router that has the columns `kept` only, without noise.

        routing: what this one decided of the same tokens. Experts are numbered as in `kept`.
        """
        select = self.select_among(kept)
        logits_NE = routing.logits_NE[:, jnp.asarray(kept, jnp.int32)]
        return route(logits_NE, k=self.k, select=select, mask_N=routing.mask_N)

    def select_among(self, kept: Sequence[int]) -> Select:
        """How tokens choose, without noise, where there are the experts `kept` only."""
        return self.select

    def restricted(self, routing: Routing, kept_E: Array) -> Routing:
        """As `among` of the experts of which bool [E] is true, numbered as they were."""
        select = self.select_for(routing.logits_NE, None)
        return route(
            routing.logits_NE, k=self.k, select=select, mask_N=routing.mask_N, support_NE=kept_E
        )


def without_padding(x_ND: Array, mask_N: Array | None) -> Array:
    """0 where there is padding: what stands there, even NaN, must not reach a kernel's gradient."""
    return x_ND if mask_N is None else jnp.where(mask_N[:, None], x_ND, 0.0)


__all__ = [
    "EXACT",
    "Decision",
    "LinearRouter",
    "MultiGateRouter",
    "NoisyMultiGateRouter",
    "NoisyRouter",
    "OffsetRouter",
    "Router",
    "TaskEmbedding",
    "TaskEmbeddingRouter",
    "TopKRouter",
    "wide_uniform",
]


def wide_uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform in +-1/sqrt(E): the reference's accident, which reads E as the number of inputs.

    For unit-variance tokens of width 384 the logits' deviation is 2.8: peaky from the start.
    """
    return fan_in_uniform(key, shape, fan_in=shape[-1])


class LinearRouter(TopKRouter):
    """One bias-free matrix for all tokens; kernel [D, E]."""

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        select: Select = softmax_then_top_k,
        noise: Noise = no_noise,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(k, select, noise)
        self.kernel = nnx.Param(init(rngs.params(), (width, experts)))

    def logits(self, x_ND: Array, context: Context) -> Array:
        return exact_product(x_ND, self.kernel.get_value())

    def with_columns(self, kept: Sequence[int]) -> Self:
        """The router that has the columns `kept` only, in that order; shares no array."""
        parts, index = module.split(self), jnp.asarray(kept, jnp.int32)
        # A kernel [D, E], and what else there is of each expert, [E].
        trees = (jax.tree.map(lambda a: a[..., index], t) for t in (parts.params, parts.stats))
        return module.merge(parts.definition, *trees)


class MultiGateRouter(TopKRouter):
    """One bias-free matrix per task, experts shared; kernel [J, D, E].

    M3ViT (arXiv:2210.14793), section 3.1, eq. 5.
    """

    depends_on_task: ClassVar[bool] = True

    def __init__(
        self,
        tasks: int,
        width: int,
        experts: int,
        k: int,
        *,
        select: Select = softmax_then_top_k,
        noise: Noise = no_noise,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(k, select, noise)
        self.kernel = nnx.Param(init(rngs.params(), (tasks, width, experts)))

    def logits(self, x_ND: Array, context: Context) -> Array:
        return product_by_task(x_ND, self.kernel.get_value(), context)

    def of_task(self, task: int) -> TopKRouter:
        """The router of one task by itself, sharing no array with this one."""
        kernel_DE = self.kernel.get_value()[task]
        width, experts = kernel_DE.shape
        alone = LinearRouter(
            width,
            experts,
            self.k,
            select=self.select,
            noise=self.noise,
            init=lambda key, shape: kernel_DE,
            rngs=nnx.Rngs(0),
        )
        return alone.within(self._of_task(task))


class TaskEmbedding(nnx.Module):
    """Learned features of every task, [J, F] with rows of unit variance; computed once per pass.

    Two linear layers with a GELU between them and a LayerNorm after them on one-hot task vectors.
    M3ViT's eq. 7 has a ReLU instead of the LayerNorm; the published code is followed.
    """

    def __init__(self, tasks: int, features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(tasks, features, rngs=rngs)
        self.fc2 = Linear(features, features, rngs=rngs)
        self.norm = LayerNorm(features)
        self.tasks = tasks

    def __call__(self) -> Array:
        return self.norm(self.fc2(gelu(self.fc1(jnp.eye(self.tasks)))))


class TaskEmbeddingRouter(TopKRouter):
    """One matrix for tokens with the features of their task appended; kernel [D + F, E].

    The features come with the condition and reach the router only, not the experts. M3ViT
    (arXiv:2210.14793), section 3.1, eq. 6-7.
    """

    depends_on_task: ClassVar[bool] = True

    def __init__(
        self,
        width: int,
        features: int,
        experts: int,
        k: int,
        *,
        select: Select = softmax_then_top_k,
        noise: Noise = no_noise,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(k, select, noise)
        self.kernel = nnx.Param(init(rngs.params(), (width + features, experts)))

    def logits(self, x_ND: Array, context: Context) -> Array:
        if context.features_JF is None:
            raise ValueError("a TaskEmbeddingRouter needs context.features_JF")
        n, width = x_ND.shape
        kernel = self.kernel.get_value()
        # The product with [token, features] is the sum of two, the second one per task only.
        offset_JE = exact_product(context.features_JF, kernel[width:])
        offset_BE = jnp.atleast_2d(offset_JE[context.task_B])
        logits_NE = exact_product(x_ND, kernel[:width])
        logits_BTE = logits_NE.reshape(offset_BE.shape[0], -1, kernel.shape[1])
        return (logits_BTE + offset_BE[:, None]).reshape(n, -1)

    def with_features(self, embedding: TaskEmbedding, task: int) -> OffsetRouter:
        """The router of one task by itself: its features decided, sharing no array."""
        kernel = self.kernel.get_value()
        width = kernel.shape[0] - embedding.fc2.kernel.shape[1]
        # All tasks at once, as in the whole model: a product with one row rounds differently.
        bias_E = _offsets(embedding, kernel[width:])[task]
        alone = OffsetRouter(kernel[:width], bias_E, self.k, self.select, self.noise)
        return alone.within(self._of_task(task))


@jax.jit
def _offsets(embedding: TaskEmbedding, kernel_FE: Array) -> Array:
    return jnp.matmul(embedding(), kernel_FE, precision=EXACT)


class OffsetRouter(TopKRouter):
    """A linear router with one constant per expert; kernel [D, E], bias [E].

    What a `TaskEmbeddingRouter` is for a fixed task: [x, f] W = x W_x + f W_f.
    """

    def __init__(self, kernel_DE: Array, bias_E: Array, k: int, select: Select, noise: Noise):
        super().__init__(k, select, noise)
        self.kernel, self.bias = nnx.Param(kernel_DE), nnx.Param(bias_E)

    def logits(self, x_ND: Array, context: Context) -> Array:
        return exact_product(x_ND, self.kernel.get_value()) + self.bias.get_value()


class NoisyRouter(TopKRouter):
    """A linear router whose noise is learned per token; kernel and noise_kernel [D, E].

    Shazeer et al. (arXiv:1701.06538), eq. 3-5; the k largest logits share one softmax, and a single
    one has its probability among all, because a softmax of one teaches nothing.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        k: int,
        *,
        select: Select | None = None,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        usual = top_k_then_softmax if k > 1 else softmax_then_top_k
        super().__init__(k, select or usual, no_noise)
        self.kernel = nnx.Param(init(rngs.params(), (width, experts)))
        # From 0, as Shazeer et al. start it: at first all experts have the same noise.
        self.noise_kernel = nnx.Param(jnp.zeros((width, experts)))

    def logits(self, x_ND: Array, context: Context) -> Array:
        return exact_product(x_ND, self.kernel.get_value())

    def noise_for(self, x_ND: Array, context: Context) -> Noise:
        return learned_noise(exact_product(x_ND, self.noise_kernel.get_value()))


class NoisyMultiGateRouter(MultiGateRouter):
    """One matrix per task and another for its noise; kernel and noise_kernel [J, D, E].

    Mod-Squad (arXiv:2212.08066) with `noisy_gating`.
    """

    def __init__(
        self,
        tasks: int,
        width: int,
        experts: int,
        k: int,
        *,
        select: Select = softmax_then_top_k,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        super().__init__(tasks, width, experts, k, select=select, init=init, rngs=rngs)
        self.noise_kernel = nnx.Param(jnp.zeros((tasks, width, experts)))

    def noise_for(self, x_ND: Array, context: Context) -> Noise:
        return learned_noise(product_by_task(x_ND, self.noise_kernel.get_value(), context))

    def of_task(self, task: int) -> NoisyRouter:
        """The router of one task by itself, sharing no array with this one."""
        kernel_DE = self.kernel.get_value()[task]
        width, experts = kernel_DE.shape
        alone = NoisyRouter(width, experts, self.k, select=self.select, rngs=nnx.Rngs(0))
        alone.kernel.set_value(kernel_DE)
        alone.noise_kernel.set_value(self.noise_kernel.get_value()[task])
        return alone.within(self._of_task(task))


def product_by_task(x_ND: Array, kernel_JDE: Array, context: Context) -> Array:
    """Each token times its task's matrix, exactly in float32; [N, E]."""
    task_B = context.task_B
    if jnp.ndim(task_B) == 0:
        # One task for all: no copy of a matrix per row.
        return exact_product(x_ND, kernel_JDE[task_B])
    # A product with one-hot rows picks exactly, and its derivative is no scatter.
    hot_BJ = jax.nn.one_hot(task_B, kernel_JDE.shape[0])
    kernel_BDE = jnp.einsum("bj,jde->bde", hot_BJ, kernel_JDE, precision=EXACT)
    x_BTD = x_ND.reshape(hot_BJ.shape[0], -1, x_ND.shape[-1]).astype(jnp.float32)
    logits_BTE = jnp.einsum("btd,bde->bte", x_BTD, kernel_BDE, precision=EXACT)
    return logits_BTE.reshape(x_ND.shape[0], -1)
