"""One batch whose rows want different adapters: each row times the factors of its own.

On a CPU rows of few tokens are a loop that reads each adapter where it lies in the bank, and rows
of many one batched product, beside which a copy of each row's factors is small. Elsewhere tokens
are sorted by adapter and are one grouped product of segments (`ops.grouped`), as in Punica's SGMV
(Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al., arXiv:2311.03285). None makes a copy of
the bank. The loop does not sort rows by adapter, so one that several rows ask for is read for each
of them; whether sorting would pay was not measured.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops import grouped
from moezoo.ops.expert import ExpertLinear, platform
from moezoo.ops.routing import Routing

MANY = 8  # tokens of a row whose products cost more than a copy of its factors


def by_row(x_BTD: Array, a_SDr: Array, b_SrO: Array, slot_B: Array) -> Array:
    """x A_s B_s with the adapter s in the bank of each row's own slot, [B, T, O].

    slot_B: int32 from 0 to S - 1; others take the nearest of these. No derivative is meant to be
    taken.
    """
    on_cpu = _in_a_loop if x_BTD.shape[1] < MANY else _batched
    apply = on_cpu if platform() == "cpu" else _grouped
    return apply(x_BTD, a_SDr, b_SrO, slot_B)


def _batched(x_BTD: Array, a_SDr: Array, b_SrO: Array, slot_B: Array) -> Array:
    return (x_BTD @ a_SDr[slot_B]) @ b_SrO[slot_B]


def _in_a_loop(x_BTD: Array, a_SDr: Array, b_SrO: Array, slot_B: Array) -> Array:
    def row(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
        x_TD, slot = given
        a_Dr = jax.lax.dynamic_index_in_dim(a_SDr, slot, 0, keepdims=False)
        b_rO = jax.lax.dynamic_index_in_dim(b_SrO, slot, 0, keepdims=False)
        return None, (x_TD @ a_Dr) @ b_rO

    return jax.lax.scan(row, None, (x_BTD, slot_B))[1]


def _grouped(x_BTD: Array, a_SDr: Array, b_SrO: Array, slot_B: Array) -> Array:
    b, t, d = x_BTD.shape
    slot_N1 = jnp.repeat(slot_B.astype(jnp.int32), t)[:, None]
    zeros_NS = jnp.zeros((b * t, a_SDr.shape[0]), jnp.float32)
    ones_N1 = jnp.ones(slot_N1.shape, jnp.float32)
    routing = Routing(
        slot_N1, ones_N1, zeros_NS, zeros_NS, zeros_NS, zeros_NS, mask_N=jnp.ones(b * t, bool)
    )
    params = {"a": a_SDr, "b": b_SrO}
    y_NO = grouped.auto(_factors, params, x_BTD.reshape(-1, d), routing).y_ND
    return y_NO.reshape(b, t, -1)


def _factors(params: dict[str, Array], x: Array, linear: ExpertLinear) -> Array:
    return linear(linear(x, params["a"]), params["b"])
