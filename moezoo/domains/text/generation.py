"""Answers to prompts from the decoder of a run on text or of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from moezoo.backbones.decoder import Float
from moezoo.backbones.generate import ChooseToken, Settings, generate, greedy, padded, sampled
from moezoo.domains.text.adapter import language_model
from moezoo.domains.text.data import encode
from moezoo.domains.text.data.example import Template, TextPiece, Turn
from moezoo.domains.text.data.tokenizer import HFTokenizer, Tokenizer
from moezoo.domains.text.domain import TEMPLATES, tokenizer_of
from moezoo.errors import UserError, unknown
from moezoo.nn import module
from moezoo.weights import hf, hf_files


class Speaker(NamedTuple):
    """A decoder and how texts become its tokens; `stop` are the tokens that end an answer."""

    parts: module.ModuleParts
    tokenizer: Tokenizer
    template: Template
    stop: tuple[int, ...]


def open_speaker(folder: Path, template: str | None = None, dtype: Float = "float32") -> Speaker:
    """The decoder of a run's newest undamaged checkpoint, or of a Hugging Face folder.

    template: a name in `TEMPLATES`; None takes the run's own, or the prompt as it is. dtype: for a
    folder's parameters and computation; a run keeps its own types.
    Raises UserError if the folder is neither, or if its tokenizer cannot be read.
    """
    if template is not None and template not in TEMPLATES:
        raise unknown("template", template, list(TEMPLATES))
    if hf_files.holds_model(folder):
        tokenizer, made = HFTokenizer(folder), TEMPLATES.get(template or "", bare)
        stop = hf.stop_tokens(folder)
        if template is not None or not stop:
            stop = (*encode.ends(made, tokenizer), *stop)
        parts = hf.load(folder, dtype=dtype, param_dtype=dtype).parts
    else:
        model, data = language_model(folder)
        tokenizer, made = tokenizer_of(data), TEMPLATES[template or data.template]
        parts, stop = module.split(model), encode.ends(made, tokenizer)
    return Speaker(parts, tokenizer, made, tuple(dict.fromkeys(stop)))


def choice(temperature: float, top_p: float) -> ChooseToken:
    """Greedy at temperature 0, else sampling; UserError for top_p without sampling."""
    if temperature != 0:
        return sampled(temperature, top_p)
    if top_p != 1:
        raise UserError(f"top_p is {top_p}, but nothing is drawn: also give a temperature above 0.")
    return greedy


def bare(turns: Sequence[Turn]) -> list[TextPiece]:
    """The prompt as it is, for models that only continue text."""
    return [TextPiece(turn.content, turn.role == "assistant") for turn in turns]


def complete(
    speaker: Speaker, prompts: Sequence[str], settings: Settings, seed: int = 0
) -> list[str]:
    """What the decoder answers to each prompt, without the end token.

    settings: its `stop` and `pad` are replaced by the speaker's. Raises UserError for an empty
    prompt.
    """
    rows = [tokens_of(speaker, prompt) for prompt in prompts]
    tokenizer = speaker.tokenizer
    tokens_BT, mask_BT = padded(rows, tokenizer.pad)
    settings = replace(settings, stop=speaker.stop, pad=tokenizer.pad)
    key = jax.random.key(seed)
    made = generate(speaker.parts, tokens_BT, settings, mask_BT=mask_BT, key=key)
    answers = zip(np.asarray(made.tokens_BT), np.asarray(made.lengths_B), strict=True)
    return [
        tokenizer.decode(t for t in tokens[:length] if t not in speaker.stop)
        for tokens, length in answers
    ]


def tokens_of(speaker: Speaker, prompt: str) -> list[int]:
    """The tokens of a prompt, including everything that the template puts before an answer."""
    if not prompt:
        raise UserError("A prompt is empty: give at least one character.")
    pieces = speaker.template((Turn("user", prompt), Turn("assistant", "")))
    tokenizer = speaker.tokenizer
    ids = [] if tokenizer.bos is None else [tokenizer.bos]
    for piece in pieces:
        if not piece.answer:
            ids += encode.tokens_of(piece, tokenizer)
    return ids
