"""A decoder as users ask it: prompts in, answers out, and what is inside of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from moezoo import regular
from moezoo.backbones.generate import Settings, generate, greedy, padded
from moezoo.domains.text.data import encode
from moezoo.domains.text.data.example import Template, Turn
from moezoo.domains.text.data.tokenizer import Tokenizer
from moezoo.domains.text.tasks import LM
from moezoo.errors import UserError, unknown
from moezoo.nn import module
from moezoo.tasks.base import Task
from moezoo.train.evaluate import usage_by_task
from moezoo.train.setup import Loaded
from moezoo.weights.rows import RowFile


class Speaker(NamedTuple):
    """A decoder and how texts become its tokens; `stop` are the tokens that end an answer."""

    parts: module.ModuleParts
    tokenizer: Tokenizer
    template: Template
    stop: tuple[int, ...]


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


class TextInference:
    """A decoder that is asked in prompts (`deploy.inference.Inference`)."""

    def __init__(self, loaded: Loaded, tokenizer: Tokenizer, template: Template):
        self.loaded, self.tokenizer = loaded, tokenizer
        self.parts = module.split(loaded.model)
        stop = encode.ends(template, tokenizer)
        self.speaker = Speaker(self.parts, tokenizer, template, stop)
        self.labels: Mapping[str, tuple[str, ...]] = {}
        self._read = jax.jit(self._run)

    @property
    def tasks(self) -> Mapping[str, Task]:
        return {task.name: task for task in self.loaded.tasks}

    def read(self, path: Any) -> str:
        """A text file as a prompt."""
        content = regular.read(path, regular.MB, UserError, "name a text file")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"'{path}' is no text, which is what the model reads.") from error

    def backdrop(self, example: Any) -> np.ndarray:
        """Always raises UserError: answers are no pictures."""
        raise UserError("A model of text gives no pictures: moezoo generate FOLDER PROMPT asks it.")

    def prepare(self, given: Any) -> dict[str, np.ndarray]:
        """Prompts as rows of tokens, int32 [B, T] each, as the decoder reads them."""
        prompts = [given] if isinstance(given, str) else list(given)
        rows = [tokens_of(self.speaker, prompt) for prompt in prompts]
        tokens_BT, mask_BT = (np.asarray(a) for a in padded(rows, self.tokenizer.pad))
        positions_BT = np.maximum(np.cumsum(mask_BT, axis=1) - 1, 0)
        found = {"tokens": tokens_BT, "segments": mask_BT, "positions": positions_BT}
        return {name: a.astype(np.int32) for name, a in found.items()} | {
            "task": np.zeros(tokens_BT.shape, np.int32)
        }

    def predict(self, given: Any, tasks: Sequence[str] | None = None) -> dict[str, list[str]]:
        """The likeliest answer to every prompt, at most 128 tokens."""
        self._check(tasks)
        prompts = [given] if isinstance(given, str) else list(given)
        return {LM: complete(self.speaker, prompts, Settings(new=128, choose=greedy))}

    def usage(self, given: Any) -> dict[str, dict[str, np.ndarray]]:
        """By MoE layer the share of the prompts' choices that each expert has, float64 [E]."""
        counts = self._read(self.parts.params, self.parts.stats, self.prepare(given))[1]
        shares = {
            layer: np.asarray(count_JE[0], np.float64) / max(float(count_JE[0].sum()), 1e-30)
            for layer, count_JE in module.in_order(counts).items()
        }
        return {LM: shares}

    def features(self, given: Any, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """What the head reads of every prompt's last token, [B, D]."""
        self._check(tasks)
        return {LM: self._read(self.parts.params, self.parts.stats, self.prepare(given))[0]}

    def streamed(self, file: RowFile) -> TextInference:
        """Always raises UserError."""
        raise UserError(
            "A decoder answers in one compiled loop over tokens, which cannot wait for experts "
            "from a file: load it as a whole."
        )

    def _check(self, tasks: Sequence[str] | None) -> None:
        for task in tasks or ():
            if task not in self.tasks:
                raise unknown("task of this model", task, list(self.tasks))

    def _run(self, params: Any, stats: Any, rows: Any) -> tuple[Any, dict[str, Any]]:
        output = module.merge(self.parts.definition, params, stats).read(rows, train=False)
        last_BD = output.predictions[LM].x_BTD[:, -1]  # prompts are padded on the left
        return last_BD, {name: usage_by_task(r, 1) for name, r in output.records.items()}
