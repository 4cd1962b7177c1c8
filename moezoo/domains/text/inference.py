"""A decoder as users ask it: prompts in, answers out, and what is inside of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moezoo import regular
from moezoo.backbones.generate import Settings, generate, greedy, padded
from moezoo.deploy.pinned import ExpertPlace
from moezoo.domains.text.data import encode
from moezoo.domains.text.data.example import Template, Turn
from moezoo.domains.text.data.tokenizer import Tokenizer
from moezoo.domains.text.tasks import LM
from moezoo.errors import UserError, unknown
from moezoo.nn import module, surgery
from moezoo.nn.context import NO_TASK, Context
from moezoo.nn.routers import Decider
from moezoo.tasks.base import Task
from moezoo.train.evaluate import usage_by_task
from moezoo.train.setup import Loaded
from moezoo.weights.rows import RowFile


class Speaker(NamedTuple):
    """A decoder and how texts become its tokens.

    stop: the tokens that end an answer.   context: what its routers are told of every prompt.
    shares_BM: of the members of an ensemble, for every prompt one each (`generate`); the context is
    told of M rows for a prompt then.
    """

    parts: module.ModuleParts
    tokenizer: Tokenizer
    template: Template
    stop: tuple[int, ...]
    context: Context = NO_TASK
    shares_BM: np.ndarray | None = None


def asks_for_task(model: Any) -> bool:
    """Whether a router of the model looks at the task of a text."""
    return any(router.depends_on_task for router in surgery.find(model, Decider).values())


class MadeAnswer(NamedTuple):
    """What follows a prompt, without the end token; tokens may say more than text, which has
    U+FFFD for bytes that are none.

    by: who made it, the largest weight first, where a route over a library weighs its members for
    each prompt.
    """

    text: str
    tokens: tuple[int, ...]
    by: tuple[tuple[str, float], ...] = ()


def complete(
    speaker: Speaker, prompts: Sequence[str], settings: Settings, seed: int = 0
) -> list[str]:
    """The texts of what `answered` gives."""
    return [answer.text for answer in answered(speaker, prompts, settings, seed)]


def answered(
    speaker: Speaker, prompts: Sequence[str], settings: Settings, seed: int = 0
) -> list[MadeAnswer]:
    """What the decoder answers to each prompt.

    settings: its `stop` and `pad` are replaced by the speaker's. Raises UserError for an empty
    prompt, and where the decoder's logits are not finite.
    """
    members = 1 if speaker.shares_BM is None else speaker.shares_BM.shape[1]
    rows = [row for prompt in prompts for row in [tokens_of(speaker, prompt)] * members]
    tokens_BT, mask_BT = padded(rows, speaker.tokenizer.pad)
    settings = replace(settings, stop=speaker.stop, pad=speaker.tokenizer.pad)
    key = jax.random.key(seed)
    told = {"mask_BT": mask_BT, "key": key, "context": speaker.context}
    made = generate(speaker.parts, tokens_BT, settings, **told, shares_BM=speaker.shares_BM)
    # All members of an ensemble say the same.
    found = (np.asarray(made.tokens_BT)[::members], np.asarray(made.lengths_B)[::members])
    return [answer_of(speaker, row[:length]) for row, length in zip(*found, strict=True)]


def answer_of(speaker: Speaker, tokens: Iterable[int]) -> MadeAnswer:
    """Tokens that were made, up to the one that ends them, as an answer."""
    kept = tuple(int(t) for t in tokens if t not in speaker.stop)
    return MadeAnswer(speaker.tokenizer.decode(kept), kept)


def check_prompt(prompt: str) -> None:
    """Raise UserError for an empty prompt, and for one that is no text."""
    if not prompt:
        raise UserError("A prompt is empty: give at least one character.")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # how Python passes on bytes that are no text
        raise UserError("A prompt is no text in UTF-8: give it in that encoding.") from error


def tokens_of(speaker: Speaker, prompt: str) -> list[int]:
    """The tokens of a prompt, including everything that the template puts before an answer."""
    check_prompt(prompt)
    pieces = speaker.template((Turn("user", prompt), Turn("assistant", "")))
    tokenizer = speaker.tokenizer
    ids = [] if tokenizer.bos is None else [tokenizer.bos]
    for piece in pieces:
        if not piece.answer:
            ids += encode.tokens_of(piece, tokenizer)
    return ids


class TextInference:
    """A decoder that is asked in prompts (`deploy.inference.Inference`).

    names: of the data's tasks, where they decide what is computed; a prompt is answered as one of
    each of them then.
    """

    def __init__(
        self, loaded: Loaded, tokenizer: Tokenizer, template: Template, names: Sequence[str] = ()
    ):
        self.loaded, self.tokenizer = loaded, tokenizer
        self.parts = module.split(loaded.model)
        stop = encode.ends(template, tokenizer)
        self.speaker = Speaker(self.parts, tokenizer, template, stop)
        self._numbers = dict(zip(names, range(len(names)), strict=True)) or {LM: 0}
        self.labels: Mapping[str, tuple[str, ...]] = {}
        self._read = jax.jit(self._run)

    @property
    def tasks(self) -> Mapping[str, Task]:
        (task,) = self.loaded.tasks
        return dict.fromkeys(self._numbers, task)

    def read(self, path: Any) -> str:
        """A text file as a prompt."""
        if not os.path.exists(path):
            raise UserError(
                f"'{str(path)[:80]}' is missing: name a text file, or ask by moezoo generate MODEL "
                "PROMPT."
            )
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
        """The likeliest answer to every prompt, at most 128 tokens, by task."""
        prompts = [given] if isinstance(given, str) else list(given)
        settings = Settings(new=128, choose=greedy)
        return {
            task: complete(self.speaker._replace(context=context), prompts, settings)
            for task, context in self._contexts(tasks).items()
        }

    def usage(self, given: Any) -> dict[str, dict[str, np.ndarray]]:
        """By task and MoE layer which share of the choices each expert has, float64 [E]."""
        return {task: self._shares(given, task) for task in self._numbers}

    def _shares(self, given: Any, task: str) -> dict[str, np.ndarray]:
        counts = self._seen(given, task)[1]
        return {
            layer: np.asarray(count_JE[0], np.float64) / max(float(count_JE[0].sum()), 1e-30)
            for layer, count_JE in module.in_order(counts).items()
        }

    def features(self, given: Any, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """By task what the head reads of every prompt's last token, [B, D]."""
        return {task: self._seen(given, task)[0] for task in self._contexts(tasks)}

    def _seen(self, given: Any, task: str) -> tuple[Any, dict[str, Any]]:
        rows = self.prepare(given)
        rows["task"] += np.int32(self._numbers[task])
        return self._read(self.parts.params, self.parts.stats, rows)

    def streamed(self, file: RowFile, place: ExpertPlace = "file") -> TextInference:
        """Always raises UserError."""
        raise UserError(
            "A decoder answers in one compiled loop over tokens, which cannot wait for experts "
            "from a file: load it as a whole."
        )

    def _contexts(self, tasks: Sequence[str] | None) -> dict[str, Context]:
        """What routers are told, by task; UserError for an unknown one."""
        for task in tasks or ():
            if task not in self._numbers:
                raise unknown("task of this model", task, list(self._numbers))
        chosen = self._numbers if tasks is None else tasks
        return {task: Context(jnp.int32(self._numbers[task])) for task in chosen}

    def _run(self, params: Any, stats: Any, rows: Any) -> tuple[Any, dict[str, Any]]:
        output = module.merge(self.parts.definition, params, stats).read(rows, train=False)
        last_BD = output.predictions[LM].x_BTD[:, -1]  # prompts are padded on the left
        # All rows are of one task, whatever its number.
        records = {n: r._replace(task_N=0 * r.task_N) for n, r in output.records.items()}
        return last_BD, {name: usage_by_task(r, 1) for name, r in records.items()}
