"""Conditional routing at five levels behind one interface: which tokens share a decision.

A level looks at what its layer sees and at the context of the tokens, and decides; one or several
linear maps then apply the decision. Uni-Perceiver-MoE (Zhu et al., arXiv:2206.04674), section 3.1:
y_i = sum over the chosen e of g_e(r_i) E_e(x_i), where r_i is

- token: the token itself;
- context: the token and an attention-pooled summary of its sequence;
- modality, task, attribute: a row of features that all tokens of a segment share.

Decisions of rows mix the maps before the product, W(c) = sum_e g_e(c) W_e (`MergedLinear`, section
3.2): with one or two rows in a batch that costs one dense layer, and a fixed condition folds into
one. Decisions of tokens take the ordinary way of a MoE layer. The published code has the attribute
level only; the form of the summary is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.batch_routers import GivenRouter
from moezoo.nn.condition_routers import ConditionRouter
from moezoo.nn.context import Context, task_of_tokens
from moezoo.nn.experts import Stack, check_sizes
from moezoo.nn.layers import Init, Linear, trunc_normal
from moezoo.nn.moe import MoE, Record
from moezoo.nn.routers import EXACT, Router
from moezoo.ops import weight_mixtures
from moezoo.ops.expert import Backend, ExpertFn, Params
from moezoo.ops.expert import ExpertLinear as Multiply
from moezoo.ops.routing import Routing, dense_weights
from moezoo.ops.weight_mixtures import WHOLE, Segments

ALL = slice(None)


def linear_map(params: Params, x: Array, linear: Multiply) -> Array:
    """One expert that is a linear map with a bias."""
    return linear(x, params["kernel"], params["bias"])


class MergedLinear(Stack):
    """E linear maps, kernel [E, in, out] and bias [E, out], applied as one mixture per row.

    They are `Experts` as well: a `MoE` can send each token to its own.
    """

    def __init__(
        self,
        experts: int,
        inputs: int,
        outputs: int,
        *,
        dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        check_sizes(experts, outputs)
        super().__init__(dtype)
        self.kernel = nnx.Param(init(rngs.params(), (experts, inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((experts, outputs)))

    @property
    def fn(self) -> ExpertFn:
        return linear_map

    @property
    def hidden(self) -> None:
        """A linear map has nothing inside."""
        return None

    def merge(self, weights_RE: Array, part: slice = ALL) -> tuple[Array, Array]:
        """The mixtures' kernels [R, in, out] and biases [R, out] in float32.

        part: the outputs that are wanted, such as those of the queries in a fused qkv; only they
        are merged.
        """
        kernel_EIO, bias_EO = self.kernel.get_value(), self.bias.get_value()
        return (
            weight_mixtures.merge(kernel_EIO[..., part], weights_RE),
            weight_mixtures.merge(bias_EO[..., part], weights_RE),
        )

    def __call__(
        self,
        x_BTD: Array,
        weights_RE: Array,
        where: Segments | None = None,
        part: slice = ALL,
    ) -> Array:
        """x_BTD times the mixture of each token's row, in `dtype`.

        weights_RE: float [R, E] (`routing.dense_weights` of a decision with one token per row).
        where: the row of each token; without it one row is everybody's, and B rows are those of
        the B examples. part: the outputs that are wanted.
        """
        # Cast when it is merged: a mixture of rounded matrices would be rounded twice.
        kernel_RIO, bias_RO = (a.astype(self.dtype) for a in self.merge(weights_RE, part))
        x_BTD = x_BTD.astype(self.dtype)
        # Each example has a mixture of its own already: nothing is to be picked.
        if where is None and weights_RE.shape[0] > 1:
            return weight_mixtures.by_example(x_BTD, kernel_RIO, bias_RO)
        return weight_mixtures.by_segment(x_BTD, kernel_RIO, bias_RO, where or WHOLE)

    def fold(self, weights_E: Array) -> Linear:
        """The dense layer that a fixed mixture is; exact in float32."""
        return self.folds(jnp.asarray(weights_E)[None])[0]

    def folds(self, weights_RE: Array) -> list[Linear]:
        """The dense layers of R fixed mixtures, merged together as a forward pass merges them."""
        kernel_RIO, bias_RO = self.merge(weights_RE)
        # In float32: the layer casts its kernel, just as a forward pass casts the mixture.
        return [_dense(*row, self.dtype) for row in zip(kernel_RIO, bias_RO, strict=True)]


class LinearByRow(nnx.Module):
    """R dense linear maps, of which each token takes that of its row: R fixed mixtures.

    Lies in `rows/0`, `rows/1`, ...; they are all of one size.
    """

    def __init__(self, rows: Sequence[Linear]):
        self.rows = nnx.List(rows)

    def __call__(self, x_BTI: Array, where: Segments = WHOLE) -> Array:
        """x_BTI times each token's matrix, in the type of the layers."""
        dtype = self.rows[0].dtype
        kernels = [row.kernel.get_value().astype(dtype) for row in self.rows]
        biases = [row.bias.get_value().astype(dtype) for row in self.rows]
        return weight_mixtures.by_segment(x_BTI.astype(dtype), kernels, biases, where)


def _dense(kernel_IO: Array, bias_O: Array, dtype: Any) -> Linear:
    inputs, outputs = kernel_IO.shape
    made = Linear(inputs, outputs, dtype=dtype, init=lambda *_: kernel_IO, rngs=nnx.Rngs(0))
    made.bias.set_value(bias_O)
    return made


class LayerDecision(Protocol):
    """Applies a layer that its level made."""

    def __call__(self, layer: Any, x_BTI: Array) -> Array: ...


class Level(Protocol):
    """Decides for tokens x_BTD; makes the layers that its decisions can be handed to."""

    def decide(self, x_BTD: Array, context: Context, key: Array | None = None) -> LayerDecision: ...

    def layer(self, maps: MergedLinear) -> nnx.Module: ...


class Undecided(NamedTuple):
    """Dense layers, or one fixed mixture per row: nothing is left to decide."""

    where: Segments = WHOLE

    def __call__(self, layer: Any, x_BTI: Array) -> Array:
        return layer(x_BTI, self.where) if isinstance(layer, LinearByRow) else layer(x_BTI)


def decide(
    level: Level | None, x_BTD: Array, context: Context, key: Array | None = None
) -> LayerDecision:
    """The decision of a level, or that of having none."""
    return Undecided(context.where) if level is None else level.decide(x_BTD, context, key)


class MergedLayer(nnx.Module):
    """Linear maps, in `experts`, that decisions of rows mix before the product."""

    def __init__(self, experts: MergedLinear):
        self.experts = experts


class RowDecision(NamedTuple):
    """The decisions of R rows and the row of each token."""

    routing: Routing
    where: Segments

    @property
    def weights_RE(self) -> Array:
        """The weight of every map in each row's mixture, float32 [R, E]."""
        return dense_weights(self.routing, self.routing.probs_NE.shape[1])

    def __call__(self, layer: MergedLayer, x_BTI: Array) -> Array:
        return layer.experts(x_BTI, self.weights_RE, self.where)


class RowLevel(nnx.Module):
    """Modality, task or attribute: a row of features per segment decides, tokens do not."""

    def __init__(self, router: ConditionRouter):
        self.router = router

    def decide(self, x_BTD: Array, context: Context, key: Array | None = None) -> RowDecision:
        """One decision for each row of `context`."""
        routing = self.router.decide(context, key)
        rows = routing.mask_N.shape[0]
        task_R = jnp.broadcast_to(jnp.asarray(context.task_B, jnp.int32), (rows,))
        context.records[context.path] = Record(routing, task_R, jnp.zeros((), jnp.int32))
        return RowDecision(routing, context.where)

    def layer(self, maps: MergedLinear) -> MergedLayer:
        """A layer of these maps."""
        return MergedLayer(maps)


class TokenDecision(NamedTuple):
    """The decisions of all B * T tokens."""

    routing: Routing

    def __call__(self, layer: MoE, x_BTI: Array) -> Array:
        y_NO = layer.combined(x_BTI.reshape(-1, x_BTI.shape[-1]), self.routing).y_ND
        return y_NO.reshape(*x_BTI.shape[:-1], -1)


class TokenLevel(nnx.Module):
    """Every token decides for itself; `apply` carries it to its maps."""

    def __init__(self, router: Router, apply: Backend):
        self.router, self.apply = router, apply

    def seen(self, x_BTD: Array, context: Context) -> Array:
        """What the router sees of each token."""
        return x_BTD

    def decide(self, x_BTD: Array, context: Context, key: Array | None = None) -> TokenDecision:
        """One decision for each token; padding gets none."""
        seen_BTD = self.seen(x_BTD, context)
        mask_N = None if context.mask_BT is None else context.mask_BT.reshape(-1)
        rows_ND = seen_BTD.reshape(-1, seen_BTD.shape[-1])
        routing = self.router(rows_ND, context, key, mask_N)
        task_N = task_of_tokens(context, rows_ND.shape[0])
        context.records[context.path] = Record(routing, task_N, jnp.zeros((), jnp.int32))
        return TokenDecision(routing)

    def layer(self, maps: MergedLinear) -> MoE:
        """A MoE layer of these maps that takes this level's decisions."""
        # It decides nothing here, but tools ask every MoE layer's router for its kind of decision.
        return MoE(GivenRouter(self.router), maps, self.apply)


class Summary(nnx.Module):
    """One vector per sequence: the mean of its tokens, weighted by how well they match a probe.

    Softmax of <probe, x> / sqrt(D) over the tokens, in float32.
    """

    def __init__(self, width: int, *, init: Init = trunc_normal, rngs: nnx.Rngs):
        self.probe = nnx.Param(init(rngs.params(), (width, 1)))

    def __call__(self, x_BTD: Array, mask_BT: Array | None = None) -> Array:
        """[B, D] float32; `mask_BT` False = padding, which is not looked at."""
        x_BTD = x_BTD.astype(jnp.float32)
        scores_BT = jnp.matmul(x_BTD, self.probe.get_value(), precision=EXACT)[..., 0]
        scores_BT *= x_BTD.shape[-1] ** -0.5
        if mask_BT is not None:
            # Scores for the softmax, tokens for the sum behind it: weight 0 does not stop a NaN.
            scores_BT = jnp.where(mask_BT, scores_BT, jnp.finfo(jnp.float32).min)
            x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0.0)
        share_BT = jax.nn.softmax(scores_BT, axis=-1)
        return jnp.einsum("bt,btd->bd", share_BT, x_BTD, precision=EXACT)


class Pool(Protocol):
    """From the tokens of sequences to one vector each: `Summary`, for example."""

    def __call__(self, x_BTD: Array, mask_BT: Array | None = None) -> Array: ...


class ContextLevel(TokenLevel):
    """Every token decides with a summary of its sequence beside it; the router is 2 D wide."""

    def __init__(self, router: Router, apply: Backend, pool: Pool):
        super().__init__(router, apply)
        self.pool = pool

    def seen(self, x_BTD: Array, context: Context) -> Array:
        """[token, summary of the prefix], float32 [B, T, 2 D]."""
        # Of the prefix only: a summary of all would tell tokens about those behind them.
        if context.known is None:
            mask_BT = None if context.mask_BT is None else context.mask_BT[:, : context.prefix]
            summary_BD = self.pool(x_BTD[:, : context.prefix], mask_BT)
        else:
            summary_BD = context.known[context.path]
        context.summaries[context.path] = summary_BD
        spread = jnp.broadcast_to(summary_BD[:, None], x_BTD.shape)
        return jnp.concatenate([x_BTD.astype(jnp.float32), spread], axis=-1)
