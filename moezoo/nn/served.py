"""A linear layer that serves many adapters at once: each row of a batch is told a slot of a bank.

The slot of every row comes as `context.task_B`; slot 0 holds zeros, the bare base. Which adapter
lies in which slot is the affair of whoever fills the bank (`weights.working_set`).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from moezoo.nn.context import Context
from moezoo.nn.injection import Frozen
from moezoo.ops.adapter_rows import by_row


class ServedUpdate(nnx.Module):
    """scale * (x A_s) B_s with each row's slot s; down [S, D, r], up [S, r, O], both 0 at first."""

    router: Any = None

    def __init__(self, inputs: int, outputs: int, rank: int, slots: int, *, scale: float):
        self.down = Frozen(jnp.zeros((slots, inputs, rank)))
        self.up = Frozen(jnp.zeros((slots, rank, outputs)))
        self.scale = scale

    def __call__(
        self,
        x_ND: Array,
        context: Context,
        key: Array | None = None,
        mask_N: Array | None = None,
    ) -> tuple[Array, None]:
        """What is added, [N, O]; x_ND are the rows of `context.task_B`, one after the other."""
        slot_B = jnp.atleast_1d(jnp.asarray(context.task_B, jnp.int32))
        x_BTD = x_ND.reshape(slot_B.shape[0], -1, x_ND.shape[-1])
        a_SDr, b_SrO = (a.get_value().astype(x_ND.dtype) for a in (self.down, self.up))
        y_BTO = self.scale * by_row(x_BTD, a_SDr, b_SrO, slot_B)
        return y_BTO.reshape(x_ND.shape[0], -1), None
