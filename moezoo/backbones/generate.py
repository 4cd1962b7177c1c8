"""Text from a decoder: the prompts in one pass, then one token per row and step from the cache.

Two compiled programs: one per shape of the prompts, and one for the whole loop of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.backbones.decoder import Decoder
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.nn.causal_attention import Cache
from moezoo.nn.context import NO_TASK, Context

MOST = 2**20  # tokens of an answer
COLDEST, HOTTEST = 1e-3, 1e3  # beyond these all probabilities are 0 and 1, or the same
ChooseToken = Callable[[Array, Array | None], Array]  # float32 logits [B, V], key -> int32 [B]


def greedy(logits_BV: Array, key: Array | None) -> Array:
    """The most likely token; of equal ones the first. No key is needed."""
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)


# Cached: equal settings are the same function, which compiles once.
@cache
def sampled(temperature: float = 1.0, top_p: float = 1.0) -> ChooseToken:
    """Draw from softmax(logits / temperature), among the likeliest tokens that make up `top_p`.

    "Nucleus sampling" (Holtzman et al., arXiv:1904.09751, section 3.1): the smallest set of tokens
    whose probability reaches top_p. Raises UserError for temperatures that are not above 0 and
    shares outside (0, 1].
    """
    if not COLDEST <= temperature <= HOTTEST:
        raise UserError(
            f"temperature is {temperature}; it must lie between {COLDEST} and {HOTTEST:g}, or be "
            "0: then the likeliest token is chosen."
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1.")

    def choose(logits_BV: Array, key: Array | None) -> Array:
        assert key is not None
        # The nucleus is that of the tempered probabilities, the order that transformers has.
        scaled_BV = logits_BV.astype(jnp.float32) / temperature
        if top_p < 1:
            scaled_BV = jnp.where(nucleus(scaled_BV, top_p), scaled_BV, -jnp.inf)
        return jax.random.categorical(key, scaled_BV, axis=-1).astype(jnp.int32)

    return choose


def nucleus(logits_BV: Array, top_p: float) -> Array:
    """The likeliest tokens that together reach `top_p`, bool [B, V]; at least one."""
    order_BV = jnp.argsort(-logits_BV, axis=-1)
    probs_BV = jnp.take_along_axis(jax.nn.softmax(logits_BV, axis=-1), order_BV, axis=-1)
    # What stands in front of a token: nothing in front of the first, so one always stays.
    kept_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV < top_p
    return jnp.put_along_axis(jnp.zeros_like(kept_BV), order_BV, kept_BV, axis=-1, inplace=False)


@dataclass(frozen=True)
class Settings:
    """How to continue texts; equal settings share their compiled programs."""

    new: int = 128
    """Tokens to make at most."""
    choose: ChooseToken = greedy
    """`greedy`, or `sampled(temperature, top_p)`."""
    stop: tuple[int, ...] = ()
    """Tokens that end a text; the first of them is still part of it."""
    pad: int = 0
    """What stands behind the end of a text."""

    def __post_init__(self) -> None:
        if not 1 <= self.new <= MOST:
            raise UserError(
                f"new is {self.new}; at least one token must be made, and {MOST:,} at most."
            )


class Generated(NamedTuple):
    """What follows the prompts: int32 tokens [B, new], padded, and the length of each row."""

    tokens_BT: Array
    lengths_B: Array


class Prompts(NamedTuple):
    """Rows of different lengths: int32 tokens [B, T] and their mask, bool, False = padding."""

    tokens_BT: np.ndarray
    mask_BT: np.ndarray


def padded(
    rows: Sequence[Sequence[int]],
    pad: int,
    side: Literal["left", "right"] = "left",
    length: int | None = None,
) -> Prompts:
    """Token ids of several texts as one array, filled up with `pad` on one side.

    length: tokens per row, those of the longest where it is not given; longer rows lose their end.
    """
    longest = max(map(len, rows), default=0) if length is None else length
    tokens_BT = np.full((len(rows), longest), pad, np.int32)
    mask_BT = np.zeros(tokens_BT.shape, bool)
    for i, row in enumerate(rows):
        kept = row[:longest]
        part = slice(longest - len(kept), None) if side == "left" else slice(len(kept))
        tokens_BT[i, part], mask_BT[i, part] = kept, True
    return Prompts(tokens_BT, mask_BT)


def generate(
    parts: module.ModuleParts,
    tokens_BT: Any,
    settings: Settings,
    *,
    mask_BT: Any = None,
    key: Array | None = None,
    context: Context = NO_TASK,
    shares_BM: Any = None,
) -> Generated:
    """Continue every row of prompts.

    parts: of a `Decoder`, with or without adapters. tokens_BT: int prompts; mask_BT: bool,
    False = padding, on the left or the right. key: for sampling; the same key gives the same text.
    context: for adapters. shares_BM: float; rows b*M + m are copies of prompt b for M members of an
    ensemble, whose logits are added up in these shares, so that all continue alike.
    Raises UserError for an empty prompt, a token out of range, shares of other rows, and where the
    logits that a token is chosen by are not finite.
    """
    tokens_BT, mask_BT = _prompts(parts, tokens_BT, mask_BT)
    if shares_BM is not None:
        shares_BM = _shares(shares_BM, len(tokens_BT))
    key = jax.random.key(0) if key is None else key
    arrays = (parts.params, parts.stats)
    logits_BV, filled = _prefill(
        parts.definition, settings.new, *arrays, tokens_BT, mask_BT, context
    )
    run = (logits_BV, filled, key, context, shares_BM)
    done, finite_B, _ = _continue(parts.definition, settings, *arrays, *run)
    _check_finite(np.asarray(finite_B), 1 if shares_BM is None else shares_BM.shape[1])
    return done


def _check_finite(finite_B: np.ndarray, members: int) -> None:
    if not finite_B.all():
        raise UserError(
            f"The logits of prompt {int(finite_B.argmin()) // members} are not finite, so no token "
            "is the likeliest: weights of the decoder or of an adapter are damaged, or too large "
            "for the type it computes in; take others, or a type that holds more (float32)."
        )


def _shares(shares_BM: Any, rows: int) -> np.ndarray:
    shares_BM = np.asarray(shares_BM, np.float32)
    if shares_BM.ndim != 2 or shares_BM.size != rows:
        raise UserError(
            f"An ensemble has a share for every row, [prompts, members]; {rows} rows have shares "
            f"of shape {shares_BM.shape}."
        )
    return shares_BM


def _prompts(
    parts: module.ModuleParts, tokens_BT: Any, mask_BT: Any
) -> tuple[np.ndarray, np.ndarray]:
    tokens_BT = np.asarray(tokens_BT, np.int32)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT, bool)
    if tokens_BT.ndim != 2 or mask_BT.shape != tokens_BT.shape:
        raise UserError(
            f"Prompts must be [rows, tokens] with a mask of the same shape; they have shape "
            f"{tokens_BT.shape} and the mask {mask_BT.shape}."
        )
    empty = np.flatnonzero(~mask_BT.any(axis=1))
    if empty.size or not tokens_BT.size:
        row = empty[0] if empty.size else 0
        raise UserError(f"Prompt {row} has no token; give at least a token that begins a text.")
    embed = parts.params.get("embed") or parts.stats["embed"]  # a frozen one is no parameter
    vocabulary = embed["table"].shape[0]
    wrong = tokens_BT[mask_BT & ((tokens_BT < 0) | (tokens_BT >= vocabulary))]
    if wrong.size:
        raise UserError(
            f"The prompts have token {wrong[0]}, the model knows 0 to {vocabulary - 1}: use the "
            "model's own tokenizer."
        )
    return tokens_BT, mask_BT


@partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    definition: Any,
    new: int,
    params: Any,
    stats: Any,
    tokens_BT: Array,
    mask_BT: Array,
    context: Context,
) -> tuple[Array, Cache]:
    """The logits behind every prompt's last token, and the cache with room for the new ones."""
    model: Decoder = module.merge(definition, params, stats)
    batch, tokens = tokens_BT.shape
    context = replace(context.collecting(), mask_BT=mask_BT)
    empty = model.empty_cache(batch, tokens + new)
    x_BTD, filled = model.features(tokens_BT, context, cache=empty)
    # The last one that is no padding, on whichever side that lies.
    last_B = tokens - 1 - jnp.argmax(mask_BT[:, ::-1], axis=1)
    # Before the head: logits of all tokens would be the largest array.
    x_B1D = jnp.take_along_axis(x_BTD, last_B[:, None, None], axis=1)
    assert filled is not None
    return model.logits(x_B1D, replace(context.collecting(), mask_BT=None))[:, 0], filled


class _State(NamedTuple):
    """Tokens made so far, the last of them, which rows have ended, and whose logits were finite."""

    step: Array
    token_B: Array
    made_BT: Array
    lengths_B: Array
    ended_B: Array
    finite_B: Array
    cache: Cache


@partial(jax.jit, static_argnums=(0, 1), donate_argnames="filled")
def _continue(
    definition: Any,
    settings: Settings,
    params: Any,
    stats: Any,
    logits_BV: Array,
    filled: Cache,
    key: Array,
    context: Context,
    shares_BM: Array | None,
) -> tuple[Generated, Array, Cache]:
    """The texts, and whose logits were finite; the cache comes back, too, so that its memory can be
    that of the argument."""
    model: Decoder = module.merge(definition, params, stats)

    def more(state: _State) -> Array:
        return (state.step < settings.new) & ~state.ended_B.all()

    def step(state: _State) -> _State:
        # Rows that have ended are padding, for the cache as for adapters' statistics.
        here = replace(context.collecting(), mask_BT=~state.ended_B[:, None])
        x_B1D, cache = model.features(state.token_B[:, None], here, cache=state.cache)
        assert cache is not None
        state = state._replace(cache=cache)
        return _chosen(settings, state, model.logits(x_B1D, here)[:, 0], key, shares_BM)

    batch = logits_BV.shape[0]
    zero_B, made_BT = jnp.zeros(batch, jnp.int32), jnp.full((batch, settings.new), settings.pad)
    made_BT = made_BT.astype(jnp.int32)
    start = _State(jnp.int32(0), zero_B, made_BT, zero_B, zero_B > 0, zero_B == 0, filled)
    first = _chosen(settings, start, logits_BV, key, shares_BM)
    end = jax.lax.while_loop(more, step, first)
    return Generated(end.made_BT, end.lengths_B), end.finite_B, end.cache


def _chosen(
    settings: Settings, state: _State, logits_BV: Array, key: Array, shares_BM: Array | None
) -> _State:
    here = jax.random.fold_in(key, state.step)
    if shares_BM is None:
        chosen_B, most_B = settings.choose(logits_BV, here), logits_BV.max(-1)
    else:  # chosen once for a prompt, or members would draw tokens of their own
        members = shares_BM.shape[1]
        logits_BMV = logits_BV.reshape(-1, members, logits_BV.shape[-1])
        summed_BV = jnp.einsum("bm,bmv->bv", shares_BM, logits_BMV, precision="highest")
        chosen_B = jnp.repeat(settings.choose(summed_BV, here), members)
        most_B = jnp.repeat(summed_BV.max(-1), members)
    token_B = jnp.where(state.ended_B, settings.pad, chosen_B)
    stops_B = (token_B[:, None] == jnp.asarray(settings.stop, jnp.int32)).any(axis=1)
    return state._replace(
        step=state.step + 1,
        token_B=token_B,
        made_BT=state.made_BT.at[:, state.step].set(token_B),
        # By who had ended before: the token that ends a text is part of it.
        lengths_B=state.lengths_B + ~state.ended_B,
        ended_B=state.ended_B | stops_B,
        # The largest is enough: one that is not a number makes it one, and -inf may stand below.
        finite_B=state.finite_B & (state.ended_B | jnp.isfinite(most_B)),
    )
