"""Soft MoE: every slot is a mixture of all tokens, every token a mixture of all slots' outputs.

Puigcerver et al. (arXiv:2308.00951), section 2, with the normalised form of section 2.3. Nothing is
chosen, dropped or balanced, so there is no `Routing`. Tokens are mixed within a row only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from moezoo.ops.exact import EXACT
from moezoo.ops.expert import ExpertFn, Params, count_experts, dense
from moezoo.ops.selection import OUTSIDE


class SoftRouting(NamedTuple):
    """How B rows of T tokens meet E experts of S slots.

    dispatch_BTES: float32, adds up to 1 over the tokens of a row; 0 for padding.
    combine_BTES: float32, adds up to 1 over all slots; 0 for padding.
    logits_BTES: float32, with noise where there was any.
    mask_BT: bool, False = padding; None = no padding.
    """

    dispatch_BTES: Array
    combine_BTES: Array
    logits_BTES: Array
    mask_BT: Array | None = None


def unit(x: Array, axis: int = -1) -> Array:
    """`x` over its length along `axis`, float32; 1e-6 keeps zeros finite."""
    x = x.astype(jnp.float32)
    return x * lax.rsqrt(jnp.sum(x**2, axis=axis, keepdims=True) + 1e-6)


def cosines(x_BTD: Array, slots_DES: Array, scale: Array) -> Array:
    """Cosines of tokens and slot vectors times `scale`, float32 [B, T, E, S]; section 2.3."""
    # The scale goes to the slots, once, not to the tokens of every row.
    return products(unit(x_BTD), scale * unit(slots_DES, axis=0))


def products(x_BTD: Array, slots_DES: Array) -> Array:
    """Inner products of tokens and slot vectors, float32 [B, T, E, S]; section 2.1."""
    x_BTD = x_BTD.astype(jnp.float32)
    # Exact: an error in a logit is a factor in a weight.
    return jnp.einsum("btd,des->btes", x_BTD, slots_DES, precision=EXACT)


def soft_route(
    x_BTD: Array,
    slots_DES: Array,
    scale: Array | None,
    *,
    noise_std: float = 0.0,
    key: Array | None = None,
    eps_BTES: Array | None = None,
    mask_BT: Array | None = None,
) -> SoftRouting:
    """One softmax each way of the cosines times `scale`, or of plain products without a scale.

    x_BTD: any float type. Noise of deviation `noise_std` (not divided by E) needs a `key` or a
    standard-normal sample `eps_BTES`. mask_BT: bool, False = padding, which may hold any value.
    """
    if mask_BT is not None:
        x_BTD = jnp.where(mask_BT[:, :, None], x_BTD, 0.0)
    logits_BTES = products(x_BTD, slots_DES) if scale is None else cosines(x_BTD, slots_DES, scale)
    if eps_BTES is None and key is not None and noise_std:
        eps_BTES = jax.random.normal(key, logits_BTES.shape, jnp.float32)
    if eps_BTES is not None:
        logits_BTES += noise_std * eps_BTES
    return mixtures(logits_BTES, mask_BT)


def mixtures(logits_BTES: Array, mask_BT: Array | None = None) -> SoftRouting:
    """The weights that float32 logits stand for; mask_BT as in `soft_route`."""
    b, t, e, s = logits_BTES.shape
    if mask_BT is not None:
        logits_BTES = jnp.where(mask_BT[:, :, None, None], logits_BTES, OUTSIDE)
    over_tokens = jax.nn.softmax(logits_BTES, axis=1) if t else logits_BTES
    over_slots = jax.nn.softmax(logits_BTES.reshape(b, t, e * s), axis=-1).reshape(b, t, e, s)
    if mask_BT is not None:
        # OUTSIDE is not enough: a row of padding alone shares its weight out evenly.
        over_tokens = jnp.where(mask_BT[:, :, None, None], over_tokens, 0.0)
        over_slots = jnp.where(mask_BT[:, :, None, None], over_slots, 0.0)
    return SoftRouting(over_tokens, over_slots, logits_BTES, mask_BT)


def soft_apply(fn: ExpertFn, params: Params, x_BTD: Array, routing: SoftRouting) -> Array:
    """y_BTD in the type of `x_BTD`: slots, each through its expert, mixed back to tokens."""
    b, t, d = x_BTD.shape
    e, s = count_experts(params), routing.dispatch_BTES.shape[-1]
    if routing.mask_BT is not None:
        # A padded token weighs 0, but 0 times what stands in it, which may be NaN, is not 0.
        x_BTD = jnp.where(routing.mask_BT[..., None], x_BTD, jnp.zeros((), x_BTD.dtype))
    slots_EBSD = _mix("btes,btd->ebsd", routing.dispatch_BTES, x_BTD)
    rows = slots_EBSD.reshape(e, b * s, d).astype(x_BTD.dtype)
    # All experts have as many rows: there is nothing to dispatch.
    outputs = jax.vmap(lambda p, x: fn(p, x, dense))(params, rows)
    y_BTD = _mix("btes,ebsd->btd", routing.combine_BTES, outputs.reshape(e, b, s, -1))
    return y_BTD.astype(x_BTD.dtype)


def _mix(subscripts: str, weights: Array, values: Array) -> Array:
    """An einsum whose factors have the type of `values` and whose sums are float32."""
    # One type for both, so that a bfloat16 model multiplies in bfloat16; sums stay float32.
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
        # A row is always like itself: the diagonal says nothing.
        least=jnp.min(jnp.where(same_XX, jnp.inf, cosine_BXX)),
        most=jnp.max(jnp.where(same_XX, -jnp.inf, cosine_BXX)),
        mean=jnp.sum(jnp.where(same_XX, 0.0, cosine_BXX)) / (b * x * (x - 1)),
    )
