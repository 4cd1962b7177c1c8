"""Rows in blocks, each of one expert, times stacked matrices, on NVIDIA GPUs.

    y_s = act(x_s W_e + b_e)        for the rows s of expert e's blocks

and the derivatives of rows, matrices and biases. The number of blocks is static, that of the blocks
in use is not: what stands in the others, NaN included, has no way in and is not worth reading.
Products are summed in float32. Kernels of our own multiply: `mosaic_products` where they fit, else
`triton_products`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.ops import mosaic_products, triton_products
from moezoo.ops.expert import Activation, platform
from moezoo.ops.kernel_activations import fuses
from moezoo.ops.mosaic_products import MosaicTable
from moezoo.ops.row_products import ProductForm, one_product
from moezoo.ops.triton_products import TritonTable

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


class Tables(NamedTuple):
    """Tiles that kernels choose from; mosaic: None where that kind of kernel is not to be had."""

    mosaic: MosaicTable | None
    triton: TritonTable


def tables_here() -> Tables:
    """The measured ones, of the GPU that programs are being made for."""
    return Tables(mosaic_products.TABLE if hopper() else None, triton_products.TABLE)


def made_of_rows(
    form: ProductForm, arrays: tuple[Array, ...], groups: Groups, tables: Tables
) -> tuple[Array, ...]:
    """What a form makes of its operands, by the fastest kernels that take them."""
    if _in_mosaic(form, arrays, groups, tables):
        assert tables.mosaic is not None
        return mosaic_products.rows(form, arrays, *_use(groups), tables.mosaic)
    return triton_products.rows(form, arrays, *_use(groups), tables.triton)


def _use(groups: Groups) -> tuple[Array, Array]:
    return groups.expert_P, groups.last_E[-1]


def _in_mosaic(
    form: ProductForm, arrays: tuple[Array, ...], groups: Groups, tables: Tables
) -> bool:
    rows, inputs = arrays[0].shape
    sizes = rows // groups.expert_P.shape[0], inputs, form.width(arrays), arrays[0].dtype
    return tables.mosaic is not None and mosaic_products.rows_fit(form, tables.mosaic, *sizes)


class _Forward(NamedTuple):
    y_SF: Array
    before_SF: Array | None  # of the activation


def _multiplied(
    x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups, tables: Tables, *,
    activation: Activation | None = None, keep: bool = False,
) -> _Forward:  # fmt: skip
    """The product; `keep` asks for what comes before the activation."""
    arrays = (x_SD, w_EDF) if b_EF is None else (x_SD, w_EDF, b_EF)
    form = one_product(biased=b_EF is not None)
    if activation is None:
        return _Forward(made_of_rows(form, arrays, groups, tables)[0], None)
    if fuses(activation) and _in_mosaic(form, arrays, groups, tables):
        form = one_product(biased=b_EF is not None, activation=activation, keep=keep)
        made = made_of_rows(form, arrays, groups, tables)
        return _Forward(made[-1], made[0] if keep else None)
    (y_SF,) = made_of_rows(form, arrays, groups, tables)
    return _Forward(activation(y_SF), y_SF if keep else None)


def derivatives_of_matrices(x_SD: Array, dy_SF: Array, groups: Groups, tables: Tables) -> Array:
    """[E, D, F]."""
    block = x_SD.shape[0] // groups.expert_P.shape[0]
    arrays = x_SD, dy_SF, groups.first_E, groups.last_E, block
    sizes = block, x_SD.shape[1], dy_SF.shape[1], x_SD.dtype
    if tables.mosaic is not None and mosaic_products.matrices_fit(tables.mosaic, *sizes):
        return mosaic_products.matrices(*arrays, table=tables.mosaic)
    return triton_products.matrices(*arrays, table=tables.triton)


def _sums(dy_SF: Array, groups: Groups) -> Array:
    """Of the rows of each expert, float32 [E, F]."""
    blocks = groups.expert_P.shape[0]
    sum_PF = jnp.sum(dy_SF.reshape(blocks, -1, dy_SF.shape[1]), axis=1, dtype=jnp.float32)
    used_P1 = (jnp.arange(blocks) < groups.last_E[-1])[:, None]
    own_EP = jnp.arange(groups.first_E.shape[0])[:, None] == groups.expert_P
    # Chosen, not multiplied by 0: nothing was ever written to blocks that are not in use.
    sum_PF = jnp.where(used_P1, sum_PF, 0.0)
    return jnp.matmul(own_EP.astype(jnp.float32), sum_PF, precision="highest")


def grouped_matmul(
    x_SD: Array,
    w_EDF: Array,
    b_EF: Array | None,
    groups: Groups,
    activation: Activation | None = None,
    *,
    tables: Tables | None = None,
) -> Array:
    """Each row times its block's expert's matrix, plus the bias, through the activation; [S, F].

    x_SD: float32, bfloat16 or float16, in P blocks of S / P rows. w_EDF, b_EF: of the same type;
    the bias may be None. activation: of each number by itself. tables: other tiles than the
    measured ones. Rows of blocks that are not in use give anything. Reverse-mode derivatives of the
    first order only.
    """
    return _product(x_SD, w_EDF, b_EF, groups, activation, tables or tables_here())


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _product(
    x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups, activation: Any, tables: Tables
) -> Array:
    return _multiplied(x_SD, w_EDF, b_EF, groups, tables, activation=activation).y_SF


def _forward(
    x_SD: Array, w_EDF: Array, b_EF: Array | None, groups: Groups, activation: Any, tables: Tables
) -> Any:
    made = _multiplied(x_SD, w_EDF, b_EF, groups, tables, activation=activation, keep=True)
    return made.y_SF, (x_SD, w_EDF, b_EF, groups, made.before_SF)


def _backward(activation: Activation | None, tables: Tables, saved: Any, dy_SF: Array) -> Any:
    x_SD, w_EDF, b_EF, groups, before_SF = saved
    if activation is not None:
        dy_SF = jax.vjp(activation, before_SF)[1](dy_SF)[0]
    (dx_SD,) = made_of_rows(one_product(transposed=True), (dy_SF, w_EDF), groups, tables)
    dw_EDF = derivatives_of_matrices(x_SD, dy_SF, groups, tables)
    db_EF = None if b_EF is None else _sums(dy_SF, groups).astype(b_EF.dtype)
    return dx_SD, dw_EDF, db_EF, None


_product.defvjp(_forward, _backward)
