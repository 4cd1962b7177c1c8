"""Answers to prompts from the decoder of a run on text or of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from moezoo.backbones.decoder import Float
from moezoo.backbones.generate import ChooseToken, greedy, sampled
from moezoo.domains.text.adapter import language_model
from moezoo.domains.text.data import encode
from moezoo.domains.text.data.example import TextPiece, Turn
from moezoo.domains.text.data.tokenizer import HFTokenizer
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


def open_speaker(
    folder: Path, template: str | None = None, dtype: Float = "float32", task: str | None = None
) -> Speaker:
    """The decoder of a run's newest undamaged checkpoint, or of a Hugging Face folder.

    template: a name in `TEMPLATES`; None takes the run's own, or the prompt as it is. dtype: for a
    folder's parameters and computation; a run keeps its own types. task: which of the run's tasks
    prompts are of, where tasks decide what is computed.
    Raises UserError if the folder is neither, if its tokenizer cannot be read, and for a task where
    none decides.
    """
    if template is not None and template not in TEMPLATES:
        raise unknown("template", template, list(TEMPLATES))
    folder = hub.folder(folder)
    context = NO_TASK
    if hf_files.holds_model(folder):
        if task is not None:
            raise UserError(f"{folder} knows no tasks: leave --task out.")
        tokenizer, made = HFTokenizer(folder), TEMPLATES.get(template or "", bare)
        stop = hf.stop_tokens(folder)
        if template is not None or not stop:
            stop = (*encode.ends(made, tokenizer), *stop)
        parts = hf.load(folder, dtype=dtype, param_dtype=dtype).parts
    else:
        model, data = language_model(folder)
        context = _context(folder, model, data, task)
        tokenizer, made = tokenizer_of(data), TEMPLATES[template or data.template]
        parts, stop = module.split(model), encode.ends(made, tokenizer)
    return Speaker(parts, tokenizer, made, tuple(dict.fromkeys(stop)), context)


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
    return [TextPiece(turn.content, turn.role == "assistant") for turn in turns]
