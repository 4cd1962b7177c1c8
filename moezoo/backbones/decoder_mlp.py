"""What stands between a decoder's attentions: one gated MLP, or experts that tokens choose.

Sparse layers of Mixtral (Jiang et al., arXiv:2401.04088), Qwen3-MoE (arXiv:2505.09388), OLMoE
(Muennighoff et al., arXiv:2409.02060) and Qwen2-MoE (arXiv:2407.10671). A linear router takes the
softmax over all E experts of a token, then the k largest; Mixtral divides these by their sum, OLMoE
does not, and Qwen's files say which (`selection`). The order matters: the sum makes a weight
independent of the experts that were not chosen, without it every expert counts in the softmax.
Qwen2-MoE adds a shared expert that sees all tokens, times the sigmoid of one logit of each; that of
DeepSeek-V2 and V3, dots.llm1 and GLM-4.5 is just added. Their routers, which may see groups of
experts and score by sigmoids, are those of `nn.group_router`.

Router logits are float32 whatever the type of the model (`nn.routers`); transformers rounds them to
the model's type, so that in half precision tokens near a tie may go elsewhere there. Noise on
routers' inputs in training (`router_jitter_noise`) is not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.errors import UserError
from moezoo.fields import AxisSize, Positive, Range, check
from moezoo.nn.context import Context, apply_linear
from moezoo.nn.experts import GatedMLPExperts
from moezoo.nn.group_router import ExpertGroups, GroupRouter, GroupRouting
from moezoo.nn.layers import Linear, normal
from moezoo.nn.moe import MoE
from moezoo.nn.routers import LinearRouter, Router
from moezoo.ops import exchange
from moezoo.ops.routing import SELECTIONS
from moezoo.ops.selection import check_learns, softmax

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
    selection: Literal[
        "softmax_then_top_k",
        "softmax_then_top_k_renormalised",
        "sigmoid_then_top_k",
        "sigmoid_then_top_k_renormalised",
    ] = "softmax_then_top_k_renormalised"
    """Weights are shares of all experts, or of the chosen ones, so that they add up to 1; or each
    expert's sigmoid, or its share of the chosen ones'."""
    choice: Literal["score", "score_plus_bias"] = "score"
    """By what experts are chosen; the bias of an expert, which weighs nothing, is the router's."""
    groups: AxisSize = 1
    """Groups of neighbouring experts."""
    top_groups: AxisSize = 1
    """Groups that a token may choose experts of."""
    group_score: Literal["best", "two_best"] = "best"
    """By what groups are chosen: the best expert's score, or the sum of the two best ones'."""
    factor: Positive = 1.0
    """What the weights of chosen experts are multiplied by."""
    every: AxisSize = 1
    """The last of every so many layers is sparse."""
    dense: AlwaysDense = ()
    """Layers, counted from 0, that have one gated MLP all the same."""
    shared: Annotated[int, Range(0, 2**24)] = 0
    """Hidden units of the shared expert, which all tokens see; 0: there is none."""
    shared_weight: Literal["sigmoid", "one"] = "sigmoid"
    """What the shared expert's output is multiplied by: the sigmoid of a token's logit, or 1."""
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
        self._check_groups()

    def _check_groups(self) -> None:
        size, rest = divmod(self.count, self.groups)
        if rest:
            raise UserError(
                f"experts.groups is {self.groups}, which does not divide experts.count, "
                f"{self.count}."
            )
        if size < GROUP_SCORES[self.group_score]:
            raise UserError(
                f"experts.group_score is {self.group_score}, but a group has one expert: take best."
            )
        if self.top_groups > self.groups or self.top_k > size * self.top_groups:
            raise UserError(
                f"experts.top_groups is {self.top_groups} of {self.groups} with {size} experts "
                f"each: a token needs {self.top_k} experts in them."
            )

    @property
    def plain(self) -> bool:
        """Whether routers are `LinearRouter`s: no groups, no bias, no factor."""
        return (self.choice, self.groups, self.factor) == ("score", 1, 1.0)

    def in_layer(self, layer: int) -> bool:
        """Whether the layer of this number has experts."""
        return bool(self.count) and (layer + 1) % self.every == 0 and layer not in self.dense


# By the names of `group_score`: how many experts' scores add up to a group's.
GROUP_SCORES = {"best": 1, "two_best": 2}


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
        return apply_linear(self.down, self.inner(x_BTD, context), context, "down")

    def inner(self, x_BTD: Array, context: Context) -> Array:
        """What the last layer gets, [B, T, F]."""
        gate = apply_linear(self.gate, x_BTD, context, "gate")
        up = apply_linear(self.up, x_BTD, context, "up")
        return jax.nn.silu(gate) * up


class SharedExpert(nnx.Module):
    """sigmoid(w x) * mlp(x): an expert for all tokens (Qwen2-MoE, arXiv:2407.10671)."""

    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs, **types: Any):
        self.mlp = GatedMLP(width, hidden, rngs=rngs, **types)
        self.weight: Any = Linear(width, 1, bias=False, init=normal, rngs=rngs, **types)

    def __call__(self, x_BTD: Array, context: Context) -> Array:
        weight_BT1 = jax.nn.sigmoid(apply_linear(self.weight, x_BTD, context, "weight"))
        return weight_BT1 * self.mlp(x_BTD, context.within("mlp"))


def _shared(width: int, config: ExpertsConfig, rngs: nnx.Rngs, types: Mapping[str, Any]) -> Any:
    if not config.shared:
        return None
    made = {"sigmoid": SharedExpert, "one": GatedMLP}[config.shared_weight]
    return made(width, config.shared, rngs=rngs, **types)


def _router(width: int, config: ExpertsConfig, rngs: nnx.Rngs) -> Router:
    select: Any = SELECTIONS[config.selection]
    sizes = (width, config.count, config.top_k)
    if config.plain:
        return LinearRouter(*sizes, select=select, init=normal, rngs=rngs)
    score = jax.nn.sigmoid if config.selection.startswith("sigmoid") else softmax
    groups = ExpertGroups(config.groups, config.top_groups, GROUP_SCORES[config.group_score])
    routing = GroupRouting(select, score, groups, config.factor)
    biased = config.choice == "score_plus_bias"
    return GroupRouter(*sizes, routing, biased=biased, rngs=rngs)


class SparseMLP(nnx.Module):
    """Experts that tokens choose, and beside them perhaps one that sees all tokens.

    The record of `routed` is left in the context; padding (`Context.mask_BT`) chooses nobody.
    """

    def __init__(self, width: int, config: ExpertsConfig, *, rngs: nnx.Rngs, **types: Any):
        own: dict[str, Any] = {"init": normal, "rngs": rngs, **types}
        experts = GatedMLPExperts(config.count, width, config.hidden, **own)
        router = _router(width, config, rngs)
        self.routed = MoE(router, experts, exchange.by_name(config.dispatch))
        self.shared: Any = _shared(width, config, rngs, types)

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
