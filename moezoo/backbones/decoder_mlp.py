"""What stands between a decoder's attentions: one gated MLP, or experts that tokens choose.

Sparse layers of Mixtral (Jiang et al., arXiv:2401.04088), Qwen3-MoE (arXiv:2505.09388), OLMoE
(Muennighoff et al., arXiv:2409.02060) and Qwen2-MoE (arXiv:2407.10671). A linear router takes the
softmax over all E experts of a token, then the k largest; Mixtral divides these by their sum, OLMoE
does not, and Qwen's files say which (`selection`). The order matters: the sum makes a weight
independent of the experts that were not chosen, without it every expert counts in the softmax.
Qwen2-MoE adds a shared expert that sees all tokens, times the sigmoid of one logit of each.

Router logits are float32 whatever the type of the model (`nn.routers`); transformers rounds them to
the model's type, so that in half precision tokens near a tie may go elsewhere there. Noise on
routers' inputs in training (`router_jitter_noise`) is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Range, check
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.experts import GatedMLPExperts
from moezoo.nn.layers import Linear, normal
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter
from moezoo.ops import exchange
from moezoo.ops.routing import SELECTIONS
from moezoo.ops.selection import check_learns

AlwaysDense = tuple[Annotated[int, Range(0, 2**16)], ...]


@dataclass(frozen=True)
class ExpertsConfig:
    """Experts in the place of a decoder's MLPs; there are none by default."""

    count: Annotated[int, Range(0, 2**16)] = 0
    """Experts of a sparse layer; 0: every layer has one gated MLP."""
    top_k: AxisSize = 2
    """Experts that a token chooses."""
    hidden: AxisSize = 14_336
    """Hidden units of an expert."""
    selection: Literal["softmax_then_top_k", "softmax_then_top_k_renormalised"] = (
        "softmax_then_top_k_renormalised"
    )
    """Weights are shares of all experts, or of the chosen ones, so that they add up to 1."""
    every: AxisSize = 1
    """The last of every so many layers is sparse."""
    dense: AlwaysDense = ()
    """Layers, counted from 0, that have one gated MLP all the same."""
    shared: Annotated[int, Range(0, 2**24)] = 0
    """Hidden units of the shared expert, which all tokens see; 0: there is none."""
    dispatch: str = "auto"
    """How tokens get to experts: a name of `ops.grouped.BACKENDS` or `ops.exchange.EXCHANGES`."""

    def __post_init__(self) -> None:
        check(self)
        exchange.by_name(self.dispatch)
        if not self.count:
            return
        if self.top_k > self.count:
            raise UserError(f"experts.top_k is {self.top_k}, but experts.count is {self.count}.")
        said = f"experts.top_k is {self.top_k} of {self.count} and selection {self.selection}"
        check_learns(SELECTIONS[self.selection], self.top_k, self.count, said)

    def in_layer(self, layer: int) -> bool:
        """Whether the layer of this number has experts."""
        return bool(self.count) and (layer + 1) % self.every == 0 and layer not in self.dense


class GatedMLP(nnx.Module):
    """down(silu(gate x) * up x): SwiGLU (Shazeer, arXiv:2002.05202, eq. 6)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "init": normal}
        self.gate: Any = Linear(width, hidden, bias=bias, rngs=rngs, **common)
        self.up: Any = Linear(width, hidden, bias=bias, rngs=rngs, **common)
        self.down: Any = Linear(hidden, width, bias=bias, rngs=rngs, **common)

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        gate = apply_linear(self.gate, x_BTD, context, "gate")
        up = apply_linear(self.up, x_BTD, context, "up")
        return apply_linear(self.down, jax.nn.silu(gate) * up, context, "down")


class SharedExpert(nnx.Module):
    """sigmoid(w x) * mlp(x): an expert for all tokens (Qwen2-MoE, arXiv:2407.10671)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, **types: Any):
        self.mlp = GatedMLP(width, hidden, rngs=rngs, **types)
        self.weight: Any = Linear(width, 1, bias=False, init=normal, rngs=rngs, **types)

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        weight_BT1 = jax.nn.sigmoid(apply_linear(self.weight, x_BTD, context, "weight"))
        return weight_BT1 * self.mlp(x_BTD, context.within("mlp"))


class SparseMLP(nnx.Module):
    """Experts that tokens choose, and beside them perhaps one that sees all tokens.

    The record of `routed` is left in the context; padding (`Context.mask_BT`) chooses nobody.
    """

    def __init__(self, width: int, config: ExpertsConfig, *, rngs: nnx.Rngs, **types: Any):
        select = SELECTIONS[config.selection]
        sizes = (width, config.count, config.top_k)
        router = LinearRouter(*sizes, select=select, init=normal, rngs=rngs)
        own: dict[str, Any] = {"init": normal, "rngs": rngs, **types}
        experts = GatedMLPExperts(config.count, width, config.hidden, **own)
        self.routed = MoE(router, experts, exchange.by_name(config.dispatch))
        beside = SharedExpert(width, config.shared, rngs=rngs, **types) if config.shared else None
        self.shared: Any = beside

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        here = context.within("routed")
        mask_N = None if context.mask_BT is None else context.mask_BT.reshape(-1)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_ND, record = self.routed(x_ND, here, None, mask_N)
        context.records[here.path] = record
        y_BTD = y_ND.reshape(x_BTD.shape)
        if self.shared is None:
            return y_BTD
        return y_BTD + self.shared(x_BTD, context.within("shared"))
