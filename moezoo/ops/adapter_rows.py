"""One batch whose rows want different adapters: each row times the factors of its own.

On a CPU rows of many tokens are one batched product, beside which a copy of each row's factors is
small. Rows of few tokens go to the factors: each takes its place at its adapter's, and the bank is
multiplied where it lies, once for every row that the most wanted adapter has; where so many passes
over the bank would cost more, a loop over rows reads each row's adapter. Elsewhere tokens are
sorted by adapter and are one grouped product of segments (`ops.grouped`), as in Punica's SGMV
(Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al., arXiv:2311.03285). None makes a copy of
the bank.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops import grouped
from moezoo.ops.expert import ExpertLinear, platform
from moezoo.ops.routing import Routing

MANY = 8  # tokens of a row whose products cost more than a copy of its factors
CHEAPER = 3  # adapters of a pass over the bank that cost what one turn of the loop costs, about


def by_row(x_BTD: Array, a_SDr: Array, b_SrO: Array, slot_B: Array) -> Array:
    """x A_s B_s with the adapter s in the bank of each row's own slot, [B, T, O].

    slot_B: int32 from 0 to S - 1; others take the nearest of these. No derivative is meant to be
    taken.
    """
    on_cpu = _in_place if x_BTD.shape[1] < MANY else _batched
    apply = on_cpu if platform() == "cpu" else _grouped
    return apply(x_BTD, a_SDr, b_SrO, jnp.clip(slot_B, 0, a_SDr.shape[0] - 1))


def _in_place(x_BTD: Array, a_SDr: Array, b_SrO: Array, slot_B: Array) -> Array:
    """In passes or in a loop, whichever costs less; only the number of passes is not known before.

    A bank that is too large for a single pass is never one, nor is a batch without rows.
    """
    rows, slots = slot_B.shape[0], a_SDr.shape[0]
    given = (x_BTD, a_SDr, b_SrO, slot_B)
    if slots > CHEAPER * rows:
        return _in_a_loop(*given)
    turn_B = jnp.tril(slot_B[:, None] == slot_B, -1).sum(1)  # earlier rows with the same adapter
    passes = turn_B.max() + 1
    return jax.lax.cond(
        passes * slots <= CHEAPER * rows,
        lambda: _in_passes(*given, turn_B, passes),
        lambda: _in_a_loop(*given),
    )


def _in_passes(
    x_BTD: Array, a_SDr: Array, b_SrO: Array, slot_B: Array, turn_B: Array, passes: Array
) -> Array:
    """Each adapter takes one of its rows in every pass, or zeros."""
    slots = a_SDr.shape[0]

    def one(number: Array, y_BTO: Array) -> Array:
        mine_B = turn_B == number
        place_B = jnp.where(mine_B, slot_B, slots)
        x_STD = jnp.zeros((slots, *x_BTD.shape[1:]), x_BTD.dtype)
        y_STO = (x_STD.at[place_B].set(x_BTD, mode="drop") @ a_SDr) @ b_SrO
        return jnp.where(mine_B[:, None, None], y_STO[slot_B], y_BTO)

    nothing_BTO = jnp.zeros((*x_BTD.shape[:2], b_SrO.shape[-1]), x_BTD.dtype)
    return jax.lax.fori_loop(0, passes, one, nothing_BTO)


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
