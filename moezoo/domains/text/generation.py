"""Answers to prompts from the decoder of a run on text or of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from moezoo.backbones.decoder import Float
from moezoo.backbones.generate import ChooseToken, greedy, sampled
from moezoo.domains.text.adapter import TEMPLATE, language_model
from moezoo.domains.text.data import encode
from moezoo.domains.text.data.example import Template, TextPiece, Turn
from moezoo.domains.text.data.tokenizer import HFTokenizer, Tokenizer
from moezoo.domains.text.domain import (
    TEMPLATES,
    TextDataConfig,
    task_number,
    tasks_of,
    tokenizer_of,
)
from moezoo.domains.text.inference import Speaker, asks_for_task
from moezoo.errors import UserError, unknown
from moezoo.nn import module
from moezoo.nn.context import NO_TASK, Context
from moezoo.weights import hf, hf_files, hub


class Speech(NamedTuple):
    """How texts become a decoder's tokens, and which of them end an answer."""

    tokenizer: Tokenizer
    template: Template
    stop: tuple[int, ...]


def speech_of_folder(folder: Path, template: str | None = None) -> Speech:
    """Of a Hugging Face folder.

    template: a name in `TEMPLATES`; None takes the one with which the folder was trained, where
    moezoo wrote it and says so, or else the prompt as it is. Raises UserError for an unknown
    template, and where the tokenizer cannot be read.
    """
    said = hf_files.config_of(folder).get(TEMPLATE) if template is None else None
    name = _known(template) if said is None else _known(str(said), f"{TEMPLATE} in {folder}")
    tokenizer, made = HFTokenizer(folder), bare if name is None else TEMPLATES[name]
    stop = hf.stop_tokens(folder)
    if name is not None or not stop:
        stop = (*encode.ends(made, tokenizer), *stop)
    return Speech(tokenizer, made, tuple(dict.fromkeys(stop)))


def speech_of_run(data: TextDataConfig, template: str | None = None) -> Speech:
    """Of a run with this data; template: a name in `TEMPLATES`, None takes the run's own."""
    tokenizer, made = tokenizer_of(data), TEMPLATES[_known(template) or data.template]
    return Speech(tokenizer, made, encode.ends(made, tokenizer))


def _known(template: str | None, what: str = "template") -> str | None:
    if template is not None and template not in TEMPLATES:
        raise unknown(what, template, list(TEMPLATES))
    return template


def open_speaker(
    folder: Path, template: str | None = None, dtype: Float = "float32", task: str | None = None
) -> Speaker:
    """The decoder of a run's newest undamaged checkpoint, or of a Hugging Face folder.

    template: as of `speech_of_folder` and `speech_of_run`. dtype: for a folder's parameters and
    computation; a run keeps its own types. task: which of the run's tasks prompts are of, where
    tasks decide what is computed.
    Raises UserError if the folder is neither, if its tokenizer cannot be read, and for a task where
    none decides.
    """
    _known(template)
    folder = hub.folder(folder)
    if hf_files.holds_model(folder):
        if task is not None:
            raise UserError(f"{folder} knows no tasks: leave --task out.")
        speech = speech_of_folder(folder, template)
        return Speaker(hf.load(folder, dtype=dtype, param_dtype=dtype).parts, *speech)
    model, data = language_model(folder)
    context = _context(folder, model, data, task)
    return Speaker(module.split(model), *speech_of_run(data, template), context)


def _context(run: Path, model: Any, data: TextDataConfig, task: str | None) -> Context:
    """What routers are told; UserError where a task is missing, or is one too many."""
    if asks_for_task(model):
        if task is None:
            names = ", ".join(tasks_of(data))
            raise UserError(
                f"In {run} the task decides what is computed: say which one the prompts are of, "
                f"--task with one of {names}."
            )
        return Context(jnp.int32(task_number(task, data)))
    if task is not None:
        raise UserError(f"Nothing in {run} depends on the task: leave --task out.")
    return NO_TASK


def choice(temperature: float, top_p: float) -> ChooseToken:
    """Greedy at temperature 0, else sampling; UserError for top_p without sampling."""
    if temperature != 0:
        return sampled(temperature, top_p)
    if top_p != 1:
        raise UserError(f"top_p is {top_p}, but nothing is drawn: also give a temperature above 0.")
    return greedy


def bare(turns: Sequence[Turn]) -> list[TextPiece]:
    """The prompt as it is, for models that only continue text."""
    return [
        # An end stands behind answers that are given, as LoraHub's examples: they have to stop.
        TextPiece(turn.content, turn.role == "assistant", end=turn.role == "assistant")
        for turn in turns
    ]
