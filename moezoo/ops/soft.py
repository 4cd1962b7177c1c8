"""Soft MoE: every slot is a mixture of all tokens, every token a mixture of all slots' outputs.

Puigcerver et al. (arXiv:2308.00951), section 2, with the normalised form of section 2.3. Nothing is
chosen, dropped or balanced, so there is no `Routing`. Tokens are mixed within a row only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.expert import ExpertFn, Params, count_experts, dense
from moezoo.ops.selection import OUTSIDE

EXACT = lax.Precision.HIGHEST


class SoftRouting(NamedTuple):
    """How B rows of T tokens meet E experts of S slots.

    dispatch_BTES: float32, adds up to 1 over the tokens of a row; 0 for padding.
    combine_BTES: float32, adds up to 1 over all slots; 0 for padding.
    logits_BTES: float32, with noise where there was any.
    """

    dispatch_BTES: Array
    combine_BTES: Array
    logits_BTES: Array


def unit(x: Array, axis: int = -1) -> Array:
    """`x` over its length along `axis`, float32; 1e-6 keeps zeros finite."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x**2, axis=axis, keepdims=True) + 1e-6)


def soft_route(
    x_BTD: Array,
    slots_DES: Array,
    scale: Array,
    *,
    noise_std: float = 0.0,
    key: Array | None = None,
    eps_BTES: Array | None = None,
    mask_BT: Array | None = None,
) -> SoftRouting:
    """Cosines of tokens and slot vectors times the learned `scale`, one softmax each way.

    x_BTD: any float type. Noise of deviation `noise_std` (not divided by E) needs a `key` or a
    standard-normal sample `eps_BTES`. mask_BT: bool, False = padding, which may hold any value.
    """
    b, t, _ = x_BTD.shape
    _, e, s = slots_DES.shape
    mask_BT = jnp.ones((b, t), bool) if mask_BT is None else mask_BT
    mask_BT11 = mask_BT[:, :, None, None]
    x_BTD = unit(jnp.where(mask_BT[:, :, None], x_BTD, 0.0))
    slots_DES = scale * unit(slots_DES, axis=0)
    logits_BTES = jnp.einsum("btd,des->btes", x_BTD, slots_DES, precision=EXACT)
    if eps_BTES is None and key is not None and noise_std:
        eps_BTES = jax.random.normal(key, logits_BTES.shape, jnp.float32)
    if eps_BTES is not None:
        logits_BTES += noise_std * eps_BTES
    logits_BTES = jnp.where(mask_BT11, logits_BTES, OUTSIDE)
    over_tokens = jax.nn.softmax(logits_BTES, axis=1) if t else logits_BTES
    over_slots = jax.nn.softmax(logits_BTES.reshape(b, t, e * s), axis=-1).reshape(b, t, e, s)
    return SoftRouting(
        dispatch_BTES=jnp.where(mask_BT11, over_tokens, 0.0),
        combine_BTES=jnp.where(mask_BT11, over_slots, 0.0),
        logits_BTES=logits_BTES,
    )


def soft_apply(fn: ExpertFn, params: Params, x_BTD: Array, routing: SoftRouting) -> Array:
    """y_BTD in the type of `x_BTD`: slots, each through its expert, mixed back to tokens."""
    b, t, d = x_BTD.shape
    e, s = count_experts(params), routing.dispatch_BTES.shape[-1]
    # A padded token weighs 0, but 0 times what stands in it, which may be NaN, is not 0.
    real_BT1 = jnp.any(routing.combine_BTES > 0, axis=(2, 3))[..., None]
    x_BTD = jnp.where(real_BT1, x_BTD, jnp.zeros((), x_BTD.dtype))
    slots_EBSD = _mix("btes,btd->ebsd", routing.dispatch_BTES, x_BTD)
    rows = slots_EBSD.reshape(e, b * s, d).astype(x_BTD.dtype)
    outputs = jax.vmap(lambda p, x: fn(p, x, dense))(params, rows)
    y_BTD = _mix("btes,ebsd->btd", routing.combine_BTES, outputs.reshape(e, b, s, -1))
    return y_BTD.astype(x_BTD.dtype)


def _mix(subscripts: str, weights: Array, values: Array) -> Array:
    """An einsum whose factors have the type of `values` and whose sums are float32."""
    weights = weights.astype(values.dtype)
    return jnp.einsum(subscripts, weights, values, preferred_element_type=jnp.float32)


class Similarity(NamedTuple):
    """Cosines of different rows: smallest, largest and mean."""

    least: Array
    most: Array
    mean: Array


def similarity(rows_BXY: Array) -> Similarity:
    """How alike the X rows of each of B matrices are; mixtures that are all alike have collapsed.

    X is at least 2. The paper's appendix looks at tokens' `combine` and slots' `dispatch` weights.
    """
    rows = rows_BXY.astype(jnp.float32)
    rows *= lax.rsqrt(jnp.sum(rows**2, axis=-1, keepdims=True) + 1e-9)
    cosine_BXX = jnp.einsum("bxy,bzy->bxz", rows, rows, precision=EXACT)
    b, x, _ = cosine_BXX.shape
    same_XX = jnp.eye(x, dtype=bool)
    return Similarity(
        least=jnp.min(jnp.where(same_XX, jnp.inf, cosine_BXX)),
        most=jnp.max(jnp.where(same_XX, -jnp.inf, cosine_BXX)),
        mean=jnp.sum(jnp.where(same_XX, 0.0, cosine_BXX)) / (b * x * (x - 1)),
    )
