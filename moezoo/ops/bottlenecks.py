"""Bottlenecks side by side: E small MLPs on the same tokens as one that is E times as wide.

sum_e g_e (U_e f(D_e x + c_e) + d_e) = [U_1 ... U_E] (g * f([D_1 ... D_E] x + c)) + sum_e g_e d_e,
every gate repeated for the hidden units of its expert: two matrix products, and no output of a
single expert is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from moezoo.ops.expert import Params


class Wide(NamedTuple):
    """E bottlenecks of b hidden units as one; down_DR with R = E * b, out_bias_ED still apart."""

    down_DR: Array
    bias_R: Array
    up_RD: Array
    out_bias_ED: Array


def side_by_side(params: Params) -> Wide:
    """The parameters of `MLPExperts`, fc1 [E, D, b] and fc2 [E, b, D], as those of one."""
    down_EDb, up_EbD = params["fc1"]["kernel"], params["fc2"]["kernel"]
    experts, width, hidden = down_EDb.shape
    down_DR = jnp.swapaxes(down_EDb, 0, 1).reshape(width, experts * hidden)
    bias_R = params["fc1"]["bias"].reshape(-1)
    return Wide(down_DR, bias_R, up_EbD.reshape(experts * hidden, -1), params["fc2"]["bias"])


def mixed(
    params: Params, x_ND: Array, gates_NE: Array, activation: Callable[[Array], Array]
) -> Array:
    """All experts on all tokens, weighted and added; [N, D] in the type of x."""
    wide = side_by_side(params)
    gates_NE = gates_NE.astype(x_ND.dtype)
    n, e = gates_NE.shape
    hidden_NEb = activation(x_ND @ wide.down_DR + wide.bias_R).reshape(n, e, -1)
    gated_NR = (hidden_NEb * gates_NE[..., None]).reshape(n, wide.up_RD.shape[0])
    return gated_NR @ wide.up_RD + gates_NE @ wide.out_bias_ED


def folded(params: Params, gates_E: Array) -> Wide:
    """One bottleneck that is the mixture under constant gates, exactly; out_bias_ED is [1, D]."""
    wide = side_by_side(params)
    hidden = wide.up_RD.shape[0] // gates_E.shape[0]
    up_RD = wide.up_RD * jnp.repeat(gates_E, hidden)[:, None]
    out_bias_1D = jnp.sum(gates_E[:, None] * wide.out_bias_ED, axis=0, keepdims=True)
    return wide._replace(up_RD=up_RD, out_bias_ED=out_bias_1D)
