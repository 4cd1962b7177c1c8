"""The floor under a MoE layer: its experts' matrix products alone, nothing routed.

Tokens lie in order and every expert has the same share of them, so there is no router, no sort, no
gather, no uneven group and no copy of a token; what is left is what a dropless layer cannot save,
the reading of E experts' parameters included.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from moezoo.errors import UserError
from moezoo.nn.experts import MLPExperts
from moezoo.ops.expert import dense

NAME = "products"


def check_products(tokens: int, k: int, experts: int) -> None:
    """UserError where the shares would be uneven."""
    if tokens * k % experts or tokens % (tokens * k // experts):
        raise UserError(
            f"The backend {NAME} gives every expert the same share of the tokens in order: "
            f"{experts} experts must divide {tokens} tokens times {k}, and their share the tokens."
        )


class Products(nnx.Module):
    """Every token through K of E experts, N * K / E tokens per expert; recomputed backward."""

    def __init__(
        self, experts: int, width: int, hidden: int, k: int, *, dtype: Any, rngs: nnx.Rngs
    ):
        self.experts = MLPExperts(experts, width, hidden, dtype=dtype, rngs=rngs)
        self.k = k

    def __call__(self, x_ND: Array) -> Array:
        n, experts = x_ND.shape[0], self.experts.count
        rows = n * self.k // experts

        @jax.checkpoint
        def add(y_ND: Array, one: tuple[Array, Any]) -> tuple[Array, None]:
            first, params = one
            x_RD = lax.dynamic_slice_in_dim(x_ND, first, rows)
            y_RD = self.experts.fn(params, x_RD, dense)
            y_RD += lax.dynamic_slice_in_dim(y_ND, first, rows)
            return lax.dynamic_update_slice_in_dim(y_ND, y_RD, first, 0), None

        first_E = jnp.arange(experts) * rows % n
        return lax.scan(add, jnp.zeros_like(x_ND), (first_E, self.experts.stacked()))[0]
