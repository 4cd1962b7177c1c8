"""Gated experts' first step on NVIDIA GPUs: two products of the same rows, in one pass.

    y_s = act(x_s G_e) * (x_s U_e)        for the rows s of expert e's blocks

SwiGLU (Shazeer, arXiv:2002.05202, eq. 6) where `act` is silu. Of two products of `grouped_matmul`
the second would read all rows again, and their meeting would read and write three arrays [S, F].
Blocks, experts and what is asked of the products: `grouped_matmul`. The rows' derivative, too, is
one pass: one sum of two products with transposes.

No card has timed these kernels yet, so only the dispatch `fused` takes them; `moezoo bench gpu`
measures both ways side by side.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops.expert import Activation
from moezoo.ops.grouped_matmul import (
    Groups,
    Tables,
    derivatives_of_matrices,
    made_of_rows,
    tables_here,
)
from moezoo.ops.kernel_activations import fuses
from moezoo.ops.row_products import gated, joined


def gated_matmul(
    x_SD: Array,
    gate_EDF: Array,
    up_EDF: Array,
    groups: Groups,
    activation: Activation,
    *,
    tables: Tables | None = None,
) -> Array:
    """The activation of each row's product with its expert's gate, times that with its up; [S, F].

    Both products meet in float32. activation: one that `kernel_activations.fuses`; erf, if it has
    one, is off by up to 3e-5 in float32, too. Else as `grouped_matmul`.
    """
    assert fuses(activation), "the kernels cannot compute it"
    return _gated(x_SD, gate_EDF, up_EDF, groups, activation, tables or tables_here())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _gated(
    x_SD: Array, gate_EDF: Array, up_EDF: Array, groups: Groups, activation: Any, tables: Tables
) -> Array:
    return made_of_rows(gated(activation), (x_SD, gate_EDF, up_EDF), groups, tables)[0]


def _forward(
    x_SD: Array, gate_EDF: Array, up_EDF: Array, groups: Groups, activation: Any, tables: Tables
) -> Any:
    arrays = x_SD, gate_EDF, up_EDF
    *kept, y_SF = made_of_rows(gated(activation, keep=True), arrays, groups, tables)
    return y_SF, (*arrays, groups, *kept)


def _backward(activation: Activation, tables: Tables, saved: Any, dy_SF: Array) -> Any:
    x_SD, gate_EDF, up_EDF, groups, before_SF, up_SF = saved

    def meet(before: Array, up: Array) -> Array:
        return activation(before) * up

    # In float32 up to the last rounding: XLA fuses it all into one pass that writes both.
    before, up, dy = (a.astype(jnp.float32) for a in (before_SF, up_SF, dy_SF))
    dgate_SF, dup_SF = (a.astype(x_SD.dtype) for a in jax.vjp(meet, before, up)[1](dy))
    (dx_SD,) = made_of_rows(joined(), (dgate_SF, dup_SF, gate_EDF, up_EDF), groups, tables)
    dmatrices = (derivatives_of_matrices(x_SD, d, groups, tables) for d in (dgate_SF, dup_SF))
    return dx_SD, *dmatrices, None


_gated.defvjp(_forward, _backward)
