"""Mixtures of adapters: soft, where slots mix all tokens, and dense, where all experts see all.

Cappellazzo, Falavigna, Brutti: "Efficient Fine-tuning of Audio Spectrogram Transformers via Soft
Mixture of Adapters", Interspeech 2024, arXiv:2402.00828, sections 2.2-2.3.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.adapters import Bottleneck
from moezoo.nn.condition_routers import ConditionRouter
from moezoo.nn.context import Context, LayerOutput, task_of_tokens
from moezoo.nn.experts import MLPExperts
from moezoo.nn.layers import Init, trunc_normal
from moezoo.nn.moe import Record
from moezoo.nn.routers import Router, TopKRouter
from moezoo.nn.soft import SoftMoE, SoftRouter
from moezoo.nn.surgery import MixtureSize
from moezoo.ops import weight_mixtures
from moezoo.ops.exact import exact_product
from moezoo.ops.routing import Routing, no_noise
from moezoo.ops.selection import softmax_of_all
from moezoo.ops.soft import SoftRouting, mixtures, products


class SoftRecord(NamedTuple):
    """A `moe.Record` of a soft mixture: its routing is all experts' shares in each token.

    mixing: dispatch and combine weights of every slot.
    """

    routing: Routing
    task_N: Array
    dropped: Array
    mixing: SoftRouting


def slot_normal(key: Array, shape: tuple[int, ...]) -> Array:
    """Deviation sqrt(2 / (S (E + D))): PyTorch's xavier_normal_ of an array [D, E, S]."""
    width, experts, slots = shape
    return math.sqrt(2 / (slots * (experts + width))) * jax.random.normal(key, shape, jnp.float32)


class SoftAdapters(SoftMoE):
    """Soft MoE with adapters as experts, which is told of padding and reports shares."""

    wants_context: ClassVar[bool] = True

    def __call__(self, x_BTD: Array, context: Context) -> LayerOutput:  # type: ignore[override]
        key = context.key if context.train else None
        y_BTD, mixing = self.mix(x_BTD, key, context.mask_BT)
        return LayerOutput(y_BTD, soft_record(mixing, context))


def soft_record(mixing: SoftRouting, context: Context) -> SoftRecord:
    """What the soft mixture did, as every loss and statistic reads it."""
    b, t, e, _ = mixing.combine_BTES.shape
    shares_NE = mixing.combine_BTES.sum(-1).reshape(b * t, e)
    real_BT = jnp.ones((b, t), bool) if mixing.mask_BT is None else mixing.mask_BT
    mask_N = real_BT.reshape(-1)
    experts_NK = jnp.where(mask_N[:, None], jnp.arange(e, dtype=jnp.int32), -1)
    # An expert's share is the sum of its slots' weights, and so the softmax of these.
    logits_NE = jax.nn.logsumexp(mixing.logits_BTES, axis=-1).reshape(b * t, e)
    logits_NE = jnp.where(mask_N[:, None], logits_NE, 0.0)
    no_noise_NE = jnp.zeros_like(logits_NE)
    routing = Routing(
        experts_NK, shares_NE, shares_NE, logits_NE, logits_NE, no_noise_NE, mask_N=mask_N
    )
    task_N = task_of_tokens(context, b * t)
    return SoftRecord(routing, task_N, jnp.zeros((), jnp.int32), mixing)


class ExpertAxisRouter(SoftRouter):
    """As published with `normalize`: slot vectors are scaled to length 1 over the experts."""

    def __call__(
        self, x_BTD: Array, key: Array | None = None, mask_BT: Array | None = None
    ) -> SoftRouting:
        kernel, scale = self.kernel.get_value(), self.scale.get_value()
        if mask_BT is not None:
            x_BTD = jnp.where(mask_BT[..., None], x_BTD, 0.0)
        return mixtures(products(short(x_BTD, -1), scale * short(kernel, 1)), mask_BT)


class UnitSoftAdapters(SoftAdapters):
    """As published with `normalize`: experts, too, see tokens of length 1."""

    def mix(self, x_BTD: Array, key: Array | None = None, mask_BT: Array | None = None) -> Any:
        """As `SoftMoE.mix`."""
        return super().mix(short(x_BTD, -1).astype(x_BTD.dtype), key, mask_BT)


def short(x: Array, axis: int) -> Array:
    """x / (|x| + 1e-6) along an axis, float32; its derivative at 0 is 0."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x**2, axis=axis, keepdims=True)
    # The root has no derivative at 0, so a 0 never reaches it.
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return x / (length + 1e-6)


class BiasedRouter(TopKRouter):
    """All E experts with the softmax of a linear map; kernel [D, E], bias [E]."""

    def __init__(self, width: int, experts: int, *, init: Init = trunc_normal, rngs: nnx.Rngs):
        super().__init__(experts, softmax_of_all, no_noise)
        self.kernel = nnx.Param(init(rngs.params(), (width, experts)))
        self.bias = nnx.Param(jnp.zeros((experts,)))

    def logits(self, x_ND: Array, context: Context) -> Array:
        return exact_product(x_ND, self.kernel.get_value()) + self.bias.get_value()


class FoldedAdapters(Bottleneck):
    """A dense mixture as one bottleneck; as a mixture it gives padding nothing."""

    wants_context: ClassVar[bool] = True

    def __call__(self, x_BTD: Array, context: Context) -> LayerOutput:  # type: ignore[override]
        y_BTD = super().__call__(x_BTD)
        if context.mask_BT is None:
            return LayerOutput(y_BTD)
        return LayerOutput(jnp.where(context.mask_BT[..., None], y_BTD, 0))


class DenseAdapters(nnx.Module):
    """Every token through all bottlenecks, weighted by the router; one product into, one out of.

    The router's selection is `softmax_of_all`. With gates that are constant for a task it is one
    wider bottleneck (`folded`).
    """

    wants_context: ClassVar[bool] = True

    def __init__(self, router: Router, experts: MLPExperts):
        self.router, self.experts = router, experts

    def __call__(self, x_BTD: Array, context: Context) -> LayerOutput:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        mask_N = None if context.mask_BT is None else context.mask_BT.reshape(-1)
        routing = self.router(x_ND, context, None, mask_N)
        params, activation = self.experts.stacked(), self.experts.activation
        y_ND = weight_mixtures.mixed(params, x_ND, routing.weights_NK, activation)
        task_N = task_of_tokens(context, x_ND.shape[0])
        record = Record(routing, task_N, jnp.zeros((), jnp.int32))
        return LayerOutput(y_ND.reshape(x_BTD.shape), record)

    @property
    def mixture_size(self) -> MixtureSize:
        """All experts are at work."""
        return MixtureSize(self.router.decision, self.experts.count, self.experts.count)

    def of_task(self, task: int) -> Any:
        """What is left of it for one task: a bottleneck where the task decides, else itself."""
        if not isinstance(self.router, ConditionRouter):
            return self
        return self.folded(self.router.decide(Context(task)).weights_NK[0])

    def folded(self, gates_E: Array) -> FoldedAdapters:
        """One bottleneck of E * b hidden units that is this mixture under constant gates.

        gates_E: float32. Raises UserError for another number of gates than experts.
        """
        if gates_E.shape != (self.experts.count,):
            raise UserError(
                f"{gates_E.shape} gates for {self.experts.count} experts: give one number each."
            )
        wide = weight_mixtures.folded(self.experts.stacked(), gates_E)
        width, hidden = wide.down_DR.shape
        options: dict[str, Any] = {
            "activation": self.experts.activation,
            "dtype": self.experts.dtype,
        }
        # What it begins with is of no account: all of it is set.
        made = FoldedAdapters(width, hidden, rngs=nnx.Rngs(0), **options)
        made.fc1.kernel.set_value(wide.down_DR.astype(jnp.float32))
        made.fc1.bias.set_value(wide.bias_R.astype(jnp.float32))
        made.fc2.kernel.set_value(wide.up_RD.astype(jnp.float32))
        made.fc2.bias.set_value(wide.out_bias_ED[0].astype(jnp.float32))
        return made
