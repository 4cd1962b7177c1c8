"""Mixture of attention heads: every token chooses the heads that look around for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.context import NO_TASK, Context, LayerOutput
from moezoo.nn.experts import Stack, StackedKernel, check_sizes
from moezoo.nn.layers import Init, Linear, trunc_normal
from moezoo.nn.moe import MoE, MoEOutput
from moezoo.nn.routers import Router
from moezoo.ops.expert import (
    Applied,
    Backend,
    ExpertFn,
    ExpertLinear,
    Params,
    each_choice,
    each_input,
    weighted_sum,
)
from moezoo.ops.routing import Routing


def project(params: Params, x: Array, linear: ExpertLinear) -> Array:
    """One bias-free linear map: what a query or an output projection is."""
    return linear(x, params["kernel"])


class HeadExperts(Stack):
    """E attention heads without their keys and values: query [E, D, F], out [E, F, D], no biases.

    F is the width of a head. Raises UserError without a unit in it or without an expert.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        head_width: int,
        *,
        dtype: Any = jnp.float32,
        init: Init = trunc_normal,
        rngs: nnx.Rngs,
    ):
        check_sizes(experts, head_width)
        super().__init__(dtype)
        self.query = StackedKernel(experts, width, head_width, init=init, rngs=rngs)
        self.out = StackedKernel(experts, head_width, width, init=init, rngs=rngs)

    @property
    def fn(self) -> ExpertFn:
        """The function of either half; the layer applies `query` and `out` of `stacked`."""
        return project

    @property
    def hidden(self) -> int:
        """F."""
        return self.query.kernel.shape[2]


class MoA(MoE):
    """Attention whose heads are experts, over one head of keys and values that all of them share.

    The K experts of a token are its heads: q_j = Q_e x, a_j = softmax(q_j k^T / sqrt(F)) v and
    y = sum over j of weight_j O_e a_j, with one routing for both products. Mixture of attention
    heads (Zhang et al., arXiv:2210.05144), in the form of Mod-Squad's code (arXiv:2212.08066).
    kv makes keys and values, D -> 2 F with bias. The softmax is float32.
    """

    def __init__(
        self,
        router: Router,
        experts: HeadExperts,
        apply: Backend,
        kv: Linear,
    ):
        super().__init__(router, experts, apply)
        self.kv = kv

    def __call__(
        self,
        x_BTD: Array,
        context: Context = NO_TASK,
        key: Array | None = None,
        mask_N: Array | None = None,
        router_input_ND: Array | None = None,
    ) -> MoEOutput:
        """As a `MoE`, but for rows of tokens [B, T, D], which look at each other.

        The output is y_ND, N = B*T. Padding (mask_N [B*T] False) gets 0 and is not looked at.
        """
        rows = x_BTD.reshape(-1, x_BTD.shape[-1])
        seen_ND = rows if router_input_ND is None else router_input_ND
        return self.mix(x_BTD, self.router(seen_ND, context, key, mask_N), context)

    def in_block(
        self, x_BTD: Array, seen_BTD: Array, context: Context, key: Array | None = None
    ) -> LayerOutput:
        """The layer in the place of a block's attention."""
        y, record = self(x_BTD, context, key)
        return LayerOutput(y.reshape(x_BTD.shape), record)

    def combined(self, x_BTD: Array, routing: Routing) -> Applied:
        """What the chosen heads give, weighted and added: y_ND."""
        y_NKD, dropped = self._heads(x_BTD, routing)
        return Applied(weighted_sum(y_NKD, routing), dropped)

    def outputs(self, x_BTD: Array, routing: Routing) -> Array:
        """What each chosen head gives before the weight, [N, K, D]."""
        return self._heads(x_BTD, routing).y_ND

    def _heads(self, x_BTD: Array, routing: Routing) -> Applied:
        stacked = self.experts.stacked()
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        q_NKF, lost = each_choice(self.apply, project, stacked["query"], x_ND, routing)
        mask_BT = routing.mask_N.reshape(x_BTD.shape[:2])
        # Weight 0 for padding is not enough: what stands there may be NaN, and 0 times NaN is NaN.
        k_BTF, v_BTF = jnp.split(self.kv(jnp.where(mask_BT[..., None], x_BTD, 0.0)), 2, axis=-1)
        q_BTKF = q_NKF.reshape(*x_BTD.shape[:2], *q_NKF.shape[1:])
        a_NKF = shared_attention(q_BTKF, k_BTF, v_BTF, mask_BT).reshape(q_NKF.shape)
        y_NKD, again = each_input(self.apply, project, stacked["out"], a_NKF, routing)
        # One routing, so both products drop the same choices: they count once.
        return Applied(y_NKD, jnp.maximum(lost, again))


def keys_and_values(experts: HeadExperts, rngs: nnx.Rngs) -> Linear:
    """A fresh `kv` that fits these experts."""
    _, width, head_width = experts.query.kernel.shape
    return Linear(width, 2 * head_width, dtype=experts.dtype, rngs=rngs)


def shared_attention(q_BTKF: Array, k_BTF: Array, v_BTF: Array, mask_BT: Array) -> Array:
    """Every query of every token against one head of keys and values, [B, T, K, F].

    Multi-query attention (Shazeer, arXiv:1911.02150); keys where the mask is False get no weight.
    """
    scores_BTKT = jnp.einsum("btkd,bsd->btks", q_BTKF, k_BTF, preferred_element_type=jnp.float32)
    # Finite: a row of padding alone would be NaN with -inf.
    scores_BTKT = jnp.where(mask_BT[:, None, None], scores_BTKT * k_BTF.shape[-1] ** -0.5, -1e30)
    weights_BTKT = jax.nn.softmax(scores_BTKT, axis=-1).astype(v_BTF.dtype)
    return jnp.einsum("btks,bsd->btkd", weights_BTKT, v_BTF)
