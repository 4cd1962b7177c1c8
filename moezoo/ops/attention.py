"""Softmax attention through cuDNN's fused kernel, on NVIDIA GPUs: when it is taken, and the call.

It never writes the scores [B, H, T, S] to memory. Plain products, which run everywhere and in any
type, stand where they are used (`nn.attention`, `nn.causal_attention`). The kernel's own arithmetic
is 16 bits wide, with scores and softmax in float32, as that of plain products in such a model; both
differ by rounding.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.errors import UserError
from moezoo.ops.expert import nvidia
from moezoo.ops.grouped import announce

# auto: cuDNN's kernel where it can be had, else plain products; cudnn: an error where it cannot.
AttentionWay = Literal["auto", "plain", "cudnn"]
HasForm = Array | jax.ShapeDtypeStruct
WIDEST, MULTIPLE = 128, 8  # features of a head
OLDEST = 8.0  # generation that the kernel is for: Ampere


def unfit(dtype: Any, width: int) -> str | None:
    """Why cuDNN has no kernel for heads of this type and width; None where it has one."""
    if jnp.dtype(dtype).itemsize != 2:
        return f"its kernel is for bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if width > WIDEST or width % MULTIPLE:
        return f"its heads are {width} wide, not a multiple of {MULTIPLE} up to {WIDEST}"
    return None


def check_way(way: AttentionWay, dtype: Any, width: int) -> None:
    """UserError where cuDNN's kernel is asked for and there is none for such heads."""
    reason = unfit(dtype, width) if way == "cudnn" else None
    if reason:
        raise UserError(f"attention is cudnn, but {reason}: take auto or plain.")


def takes_kernel(
    way: AttentionWay,
    q_BTHD: HasForm,
    k_BSGD: HasForm,
    v_BSGD: HasForm,
    seen_BTS: HasForm | None = None,
) -> bool:
    """Whether `by_kernel` is to be called with arrays of these forms.

    Not for sizes that are not known, as in a program that is exported for any, and not where there
    are other keys than the queries' own tokens (a cache), whatever the way. Raises UserError where
    `cudnn` was asked for and does not fit.
    """
    shapes = q_BTHD.shape, k_BSGD.shape, v_BSGD.shape
    known = all(isinstance(size, int) for shape in shapes for size in shape)
    if way == "plain" or not known or q_BTHD.shape[1] != k_BSGD.shape[1]:
        return False
    # The derivative under a mask is for even numbers of tokens.
    whole = seen_BTS is None or q_BTHD.shape[1] % 2 == 0
    same = q_BTHD.shape[3] == k_BSGD.shape[3] == v_BSGD.shape[3]
    same &= q_BTHD.dtype == k_BSGD.dtype == v_BSGD.dtype
    if way == "cudnn" and not (whole and same):
        what = "values of the keys' width and type" if whole else "an even number of tokens"
        raise UserError(f"attention is cudnn, which needs {what}: take auto or plain.")
    check_way(way, q_BTHD.dtype, q_BTHD.shape[3])
    if way == "cudnn":
        return True
    fits = whole and same and unfit(q_BTHD.dtype, q_BTHD.shape[3]) is None
    if fits and nvidia() and _new_enough():
        announce("moezoo: attention cudnn (gpu)")
        return True
    return False


def _new_enough() -> bool:
    """Whether the GPU that programs are being made for is of Ampere's generation or newer."""
    if jax.sharding.get_abstract_mesh().abstract_device is not None:
        return True  # a card that is not here is one to be bought
    return float(getattr(jax.devices()[0], "compute_capability", OLDEST)) >= OLDEST


def by_kernel(
    q_BTHD: Array,
    k_BSGD: Array,
    v_BSGD: Array,
    seen_BTS: Array | None = None,
    scale: float | None = None,
) -> Array:
    """Attention of H heads of queries to G of keys and values; the heads side by side, [B, T, H*D].

    seen_BTS: bool, what each token sees. scale: of the scores, 1/sqrt(D) where it is not given.
    Tokens that see nobody give anything finite. On other machines than those with NVIDIA's GPUs the
    same by XLA. Reverse-mode derivatives of the first order only.
    """
    mask = None if seen_BTS is None else seen_BTS[:, None]
    mixed = jax.nn.dot_product_attention(
        q_BTHD, k_BSGD, v_BSGD, mask=mask, scale=scale,
        implementation="cudnn" if nvidia() else "xla",
    )  # fmt: skip
    return mixed.reshape(*q_BTHD.shape[:2], -1)
