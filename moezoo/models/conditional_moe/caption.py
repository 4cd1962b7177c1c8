"""Captions from a conditional encoder: the image once, then one token per step.

A caption is read causally: the special token and the image see only each other, so that their keys
and values, computed under the condition's first row, stay as they are while the text grows under
its second one. Each next token is the most similar candidate among the encoded vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from moezoo.backbones.generate import Settings, greedy
from moezoo.errors import UserError
from moezoo.models.conditional_moe.model import ConditionalMoE
from moezoo.models.conditional_moe.tokens import TEXT, EncoderInputs, Modality
from moezoo.nn.causal_attention import KeyValues
from moezoo.nn.context import Context
from moezoo.ops.weight_mixtures import Segments


class Caption(NamedTuple):
    """int32 tokens [B, new], padded; the length of each row; what each token was chosen by.

    logits_BTV: float32, 0 behind the end of a row.
    """

    tokens_BT: Array
    lengths_B: Array
    logits_BTV: Array


def caption(
    model: ConditionalMoE,
    image_BHWC: Array,
    condition: str,
    words_VD: Array,
    settings: Settings,
    *,
    bos: int,
    key: Array | None = None,
) -> Caption:
    """Captions of images, under a condition such as "caption|input"; to be jitted.

    words_VD: `model.words("caption|target")`. settings: how many tokens at most, how they are
    chosen, which of them end a text (`Settings`). bos: the token that every text begins with.
    key: for sampling. Raises UserError where the condition is not read causally, the text would
    have more tokens than the model has positions, or tokens are not in its vocabulary.
    """
    _check(model, condition, settings)
    _check_tokens(model, words_VD, bos, settings)
    if key is None and settings.choose is not greedy:
        key = jax.random.key(0)
    start = _prefix(model, image_BHWC, condition, settings.new)
    slots = start.kept[0].keys_BSGD.shape[1]
    batch = image_BHWC.shape[0]

    def step(state: _CaptionState, number: Array) -> tuple[_CaptionState, tuple[Array, ...]]:
        context = replace(start.text, summaries={}, records={})
        x_B1D = model.tokens.text(state.token_B[:, None], number)
        slot = start.tokens + number
        seen_BTS = (jnp.arange(slots) <= slot)[None, None]
        done = model.encoder(x_B1D, context, seen_BTS, None, state.kept, slot)
        logits_BV = model.scores(done.x_BTD[:, 0], words_VD)
        # Without a key nothing of random numbers stands in the program: not every runtime has them.
        own = key if key is None else jax.random.fold_in(key, number)
        chosen_B = settings.choose(logits_BV, own)
        # Ended texts go on with padding: a scan has one length for all.
        token_B = jnp.where(state.ended_B, settings.pad, chosen_B).astype(jnp.int32)
        stops_B = (token_B[:, None] == jnp.asarray(settings.stop, jnp.int32)).any(axis=1)
        # Before this token: the one that ends a text is part of it.
        there_B = ~state.ended_B
        logits_BV = jnp.where(there_B[:, None], logits_BV, 0.0)
        ended_B = state.ended_B | stops_B
        return _CaptionState(token_B, ended_B, done.kept), (token_B, there_B, logits_BV)

    first = _CaptionState(jnp.full(batch, bos, jnp.int32), jnp.zeros(batch, bool), start.kept)
    _, (tokens_TB, there_TB, logits_TBV) = jax.lax.scan(step, first, jnp.arange(settings.new))
    lengths_B = there_TB.sum(axis=0, dtype=jnp.int32)
    return Caption(tokens_TB.T, lengths_B, logits_TBV.swapaxes(0, 1))


class _CaptionState(NamedTuple):
    """The last token of each text, whether it ended it, keys and values so far."""

    token_B: Array
    ended_B: Array
    kept: tuple[KeyValues, ...]


class _Prefix(NamedTuple):
    """Keys and values of special token and image with room for a text, and what it is told."""

    kept: tuple[KeyValues, ...]
    tokens: int
    text: Context


def _prefix(model: ConditionalMoE, image_BHWC: Array, condition: str, new: int) -> _Prefix:
    sequence = model.tokens(EncoderInputs(image_BHWC))
    whole = (*sequence.parts, Modality(TEXT, new))
    model.check_condition(condition, whole)
    context = model.context(condition, whole)
    rows = context.where.rows
    # Where a condition has one row only, it is both.
    before, behind = (Segments(rows=(row,)) for row in (rows[0], rows[-1]))
    tokens = sequence.x_BTD.shape[1]
    everything = jnp.ones((1, tokens, tokens), bool)
    done = model.encoder(sequence.x_BTD, replace(context, where=before), everything)

    def longer(a_BSGD: Array) -> Array:
        return jnp.pad(a_BSGD, ((0, 0), (0, new), (0, 0), (0, 0)))

    # The text's tokens see the summaries that the prefix left behind.
    text = replace(context, where=behind, known=context.summaries)
    return _Prefix(jax.tree.map(longer, done.kept), tokens, text)


def _check(model: ConditionalMoE, condition: str, settings: Settings) -> None:
    if not model.table.entry(condition).causal:
        raise UserError(
            f"{condition} is not read causally, so no text can be continued under it: take one "
            "with the word causal in the table of conditions."
        )
    if settings.new > model.config.text_length:
        raise UserError(
            f"A caption of {settings.new} tokens does not fit into the model's "
            f"{model.config.text_length} positions: take fewer, or raise model.text_length."
        )


def _check_tokens(model: ConditionalMoE, words_VD: Array, bos: int, settings: Settings) -> None:
    vocabulary = model.config.vocabulary
    for name, token in (("bos", bos), ("settings.pad", settings.pad)):
        if not 0 <= token < vocabulary:
            raise UserError(
                f"{name} is {token}, the model knows tokens 0 to {vocabulary - 1}: use the "
                "tokenizer that the model was made for."
            )
    if words_VD.shape[0] > vocabulary:
        raise UserError(
            f"There are {words_VD.shape[0]} words to choose from, the model knows {vocabulary}: "
            "encode them with its own method `words`."
        )
