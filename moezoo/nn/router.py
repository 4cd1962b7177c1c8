"""What a router is, and what those have in common whose tokens choose k experts.

Every router has the kind of its `decision`, which says what pruning may promise later:
"constant" (nothing decides), "task", "task_support" (a token chooses inside its task's set),
"token" (anything may happen), "row" (the other tokens of its row matter), "batch" (all other tokens
matter) or "soft".
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moezoo.nn.condition import Condition
from moezoo.ops.routing import Noise, Routing, Select, route
from moezoo.ops.selection import check_learns

Decision = Literal["constant", "task", "task_support", "token", "row", "batch", "soft"]

# Logits decide indices, so matrix units must not round their inputs to bfloat16.
EXACT = lax.Precision.HIGHEST


class Router(Protocol):
    """What `moe.MoE` asks of a router; `x_ND` are B rows of T tokens each, N = B*T."""

    decision: ClassVar[Decision]
    depends_on_task: ClassVar[bool]

    def __call__(
        self,
        x_ND: Array,
        condition: Condition,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing: ...


class TopKRouter(nnx.Module):
    """k experts per token, chosen from [N, E] logits; kinds of router fill in the hooks.

    Raises UserError for a selection that could teach it nothing (`selection.check_learns`).
    """

    decision: ClassVar[Decision] = "token"
    depends_on_task: ClassVar[bool] = False

    def __init__(self, k: int, select: Select, noise: Noise):
        check_learns(select, k)
        self.k, self.select, self.noise = k, select, noise

    def logits(self, x_ND: Array, condition: Condition) -> Array:
        """Clean logits, float32 [N, E]."""
        raise NotImplementedError

    def noise_for(self, x_ND: Array, condition: Condition) -> Noise:
        """The noise of these tokens' logits."""
        return self.noise

    def select_for(self, logits_NE: Array, key: Array | None) -> Select:
        """How these tokens choose; `key` is there in training only."""
        return self.select

    def support_for(self, logits_NE: Array) -> Array | None:
        """The experts these tokens may choose from, bool [E] or [N, E]; None = all."""
        return None

    def __call__(
        self,
        x_ND: Array,
        condition: Condition,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> Routing:
        x_ND = without_padding(x_ND, mask_N)
        logits_NE = self.logits(x_ND, condition)
        return route(
            logits_NE,
            k=self.k,
            select=self.select_for(logits_NE, key),
            noise=self.noise_for(x_ND, condition),
            key=key,
            mask_N=mask_N,
            support_NE=self.support_for(logits_NE),
        )


def without_padding(x_ND: Array, mask_N: Array | None) -> Array:
    """0 where there is padding: what stands there, even NaN, must not reach a kernel's gradient."""
    return x_ND if mask_N is None else jnp.where(mask_N[:, None], x_ND, 0.0)


def product(x_ND: Array, kernel_DE: Array) -> Array:
    """Tokens times one matrix, exactly in float32."""
    return jnp.matmul(x_ND.astype(jnp.float32), kernel_DE, precision=EXACT)
