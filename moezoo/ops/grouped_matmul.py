"""Rows in blocks, each of one expert, times stacked matrices, on NVIDIA GPUs.

    y_s = act(x_s W_e + b_e)        for the rows s of expert e's blocks

and the derivatives of rows, matrices and biases. The number of blocks is static, that of the blocks
in use is not: what stands in the others, NaN included, has no way in and is not worth reading.
Products are summed in float32. Kernels of our own multiply: `mosaic_products` where they fit, else
`triton_products`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops import mosaic_products, triton_products
from moezoo.ops.expert import Activation, platform

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # parts of the names of cards of this kind
LARGEST, LEAST = 128, 16  # rows of a block


class Groups(NamedTuple):
    """Which blocks are whose, int32.

    expert_P: the expert of each block. first_E, last_E: each expert's first block and one past its
    last, at least one for each expert, in ascending order without gaps.
    """

    expert_P: Array
    first_E: Array
    last_E: Array


def rows_of_block(rows: int, experts: int) -> int:
    """Rows of a block: a power of two that an average group fills.

    Half a block of an expert is wasted on average, and small blocks reread matrices.
    """
    size = LARGEST
    while size > LEAST and rows < size * experts:
        size //= 2
    return size


def hopper() -> bool:
    """Whether programs are being made for a GPU of NVIDIA's Hopper generation."""
    if platform() != "gpu":
        return False
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return any(name in kind for name in HOPPER)


def kernels_for(fit: Callable[..., bool], block: int, inputs: int, outputs: int, of: Any) -> Any:
    """The module whose kernels multiply: fit: of Mosaic's. of: a type of numbers."""
    return mosaic_products if hopper() and fit(block, inputs, outputs, of) else triton_products


class _Forward(NamedTuple):
    y_SF: Array
    before_SF: Array | None  # of the activation


def _multiplied(
    x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups, *, transposed: bool = False,
    activation: Activation | None = None, keep: bool = False,
) -> _Forward:  # fmt: skip
    """The product; `keep` asks for what comes before the activation."""
    block, used = x_SD.shape[0] // groups.expert_P.shape[0], groups.last_E[-1]
    arrays = x_SD, w_EDF, b_EF, groups.expert_P, used
    inputs, outputs = w_EDF.shape[:0:-1] if transposed else w_EDF.shape[1:]
    kernels = kernels_for(mosaic_products.rows_fit, block, inputs, outputs, x_SD.dtype)
    if kernels is mosaic_products:
        fused = activation if activation and mosaic_products.fuses(activation) else None
        made = mosaic_products.rows(
            *arrays, transposed=transposed, activation=fused, keep=keep and fused is not None
        )
        if fused is activation:
            return _Forward(*made)
        y_SF = made.y_SF
    else:
        y_SF = triton_products.rows(*arrays, transposed=transposed)
    if activation is None:
        return _Forward(y_SF, None)
    return _Forward(activation(y_SF), y_SF if keep else None)


def _derivatives(x_SD: Array, dy_SF: Array, groups: Groups) -> Array:
    """Of the matrices, [E, D, F]."""
    block = x_SD.shape[0] // groups.expert_P.shape[0]
    sizes = block, x_SD.shape[1], dy_SF.shape[1]
    kernels = kernels_for(mosaic_products.matrices_fit, *sizes, x_SD.dtype)
    return kernels.matrices(x_SD, dy_SF, groups.first_E, groups.last_E, block)


def _sums(dy_SF: Array, groups: Groups) -> Array:
    """Of the rows of each expert, float32 [E, F]."""
    blocks = groups.expert_P.shape[0]
    sum_PF = jnp.sum(dy_SF.reshape(blocks, -1, dy_SF.shape[1]), axis=1, dtype=jnp.float32)
    used_P1 = (jnp.arange(blocks) < groups.last_E[-1])[:, None]
    own_EP = jnp.arange(groups.first_E.shape[0])[:, None] == groups.expert_P
    # Chosen, not multiplied by 0: nothing was ever written to blocks that are not in use.
    sum_PF = jnp.where(used_P1, sum_PF, 0.0)
    return jnp.matmul(own_EP.astype(jnp.float32), sum_PF, precision="highest")


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def grouped_matmul(
    x_SD: Array,
    w_EDF: Array,
    b_EF: Array | None,
    groups: Groups,
    activation: Activation | None = None,
) -> Array:
    """Each row times its block's expert's matrix, plus the bias, through the activation; [S, F].

    x_SD: float32, bfloat16 or float16, in P blocks of S / P rows. w_EDF, b_EF: of the same type;
    the bias may be None. activation: of each number by itself. Rows of blocks that are not in use
    give anything. Reverse-mode derivatives of the first order only.
    """
    return _multiplied(x_SD, w_EDF, b_EF, groups, activation=activation).y_SF


def _forward(x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups, activation: Any) -> Any:
    made = _multiplied(x_SD, w_EDF, b_EF, groups, activation=activation, keep=True)
    return made.y_SF, (x_SD, w_EDF, b_EF, groups, made.before_SF)


def _backward(activation: Activation | None, saved: Any, dy_SF: Array) -> Any:
    x_SD, w_EDF, b_EF, groups, before_SF = saved
    if activation is not None:
        dy_SF = jax.vjp(activation, before_SF)[1](dy_SF)[0]
    dx_SD = _multiplied(dy_SF, w_EDF, None, groups, transposed=True).y_SF
    dw_EDF = _derivatives(x_SD, dy_SF, groups)
    db_EF = None if b_EF is None else _sums(dy_SF, groups).astype(b_EF.dtype)
    return dx_SD, dw_EDF, db_EF, None


grouped_matmul.defvjp(_forward, _backward)
