"""The Soft MoE layer: no token is sent anywhere, slots mix all tokens of a row."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.nn.context import Context, LayerOutput
from moezoo.nn.experts import Experts
from moezoo.nn.layers import Init
from moezoo.nn.routers import Decision
from moezoo.nn.surgery import MixtureSize
from moezoo.ops.expert import count_experts
from moezoo.ops.soft import SoftRouting, soft_apply, soft_route


def lecun_normal(key: Array, shape: tuple[int, ...]) -> Array:
    """What V-MoE's slot vectors start from; they are normalised, so only directions matter."""
    return jax.nn.initializers.lecun_normal()(key, shape, jnp.float32)


class SoftRouter(nnx.Module):
    """Slot vectors and the scale of their cosines; kernel [D, E, S], scale scalar.

    scale: what the learned factor starts from; without one logits are plain inner products and
    there is no such parameter. Soft MoE (arXiv:2308.00951), sections 2.1-2.3. `noise_std` acts only
    with a key.
    """

    decision: ClassVar[Decision] = "soft"
    depends_on_task: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        experts: int,
        slots: int,
        *,
        noise_std: float = 0.0,
        scale: float | None = 1.0,
        init: Init = lecun_normal,
        rngs: nnx.Rngs,
    ):
        if slots < 1:
            raise UserError(f"{slots} slots per expert: every expert needs at least one.")
        self.kernel = nnx.Param(init(rngs.params(), (width, experts, slots)))
        self.scale: Any = None if scale is None else nnx.Param(jnp.asarray(scale, jnp.float32))
        self.noise_std = noise_std

    def __call__(
        self, x_BTD: Array, key: Array | None = None, mask_BT: Array | None = None
    ) -> SoftRouting:
        return soft_route(
            x_BTD,
            self.kernel.get_value(),
            None if self.scale is None else self.scale.get_value(),
            noise_std=self.noise_std,
            key=key,
            mask_BT=mask_BT,
        )


class SoftOutput(NamedTuple):
    """y_BTD in the type of the input, and how tokens and slots were mixed."""

    y_BTD: Array
    routing: SoftRouting


class SoftMoE(nnx.Module):
    """Mixes each row's tokens into E * S slots, applies the experts, mixes back.

    Tokens of different rows never meet; V-MoE's groups are rows here, one image each.
    """

    def __init__(self, router: SoftRouter, experts: Experts):
        self.router, self.experts = router, experts

    @property
    def mixture_size(self) -> MixtureSize:
        """Every token reaches all experts, each in some measure."""
        experts = count_experts(self.experts.stacked())
        return MixtureSize(self.router.decision, experts, experts)

    def __call__(
        self, x_BTD: Array, key: Array | None = None, mask_BT: Array | None = None
    ) -> Array:
        """y_BTD; in the place of a dense MLP. mask_BT: bool, False = padding, which gets 0."""
        return self.mix(x_BTD, key, mask_BT).y_BTD

    def in_block(
        self, x_BTD: Array, seen_BTD: Array, context: Context, key: Array | None = None
    ) -> LayerOutput:
        """The layer in the place of a block's MLP.

        It leaves no record: every token goes to all its experts and every expert has as many slots,
        so that there is nothing to count, to balance or to drop.
        """
        return LayerOutput(self.mix(x_BTD, key).y_BTD)

    def mix(
        self, x_BTD: Array, key: Array | None = None, mask_BT: Array | None = None
    ) -> SoftOutput:
        """As a call, with the mixture weights beside it."""
        routing = self.router(x_BTD, key, mask_BT)
        y_BTD = soft_apply(self.experts.fn, self.experts.stacked(), x_BTD, routing)
        return SoftOutput(y_BTD, routing)
