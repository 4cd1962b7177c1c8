"""A decoder as a function of one array: rows of one task, and what a path on them is scored by.

A row is int32 [2, T]: token ids, -1 for padding behind them, and 1 where the next token is part of
an answer. Only there are logits given; elsewhere they are 0. So two models are compared by what
they would answer, never by how they would go on with a question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from moezoo.data.source import Info, SourceExample
from moezoo.deploy import task_path
from moezoo.deploy.exporter import Subject
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import TaskPath
from moezoo.deploy.runtime import drawing
from moezoo.deploy.specialise import copy_of, dense_layer
from moezoo.domains.text.data.rows import Padded
from moezoo.domains.text.data.tokenizer import Tokenizer
from moezoo.domains.text.domain import TextDataConfig, open_rows, tasks_of, tokenizer_of
from moezoo.errors import UserError, unknown
from moezoo.label import ROWS
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn.context import Context
from moezoo.nn.injection import fold_decided
from moezoo.nn.rank_blocks import routed_updates
from moezoo.tasks.base import State, Task, only_rows
from moezoo.tasks.language import ByTask, cross_entropy
from moezoo.tasks.output import TaskOutput
from moezoo.tasks.painting import WordKey
from moezoo.train.domain import Classes
from moezoo.train.setup import Loaded

ROW, TARGETS = "rows", "targets"
CUT = (
    "Removed experts are gone with their columns in the routers, as files of this family have it: "
    "a token that would have asked for one asks for the next best of the others. "
)
RENORMALISED = (
    CUT + "A token's weights add up to 1 whatever experts there are, so a row of which no token "
    "asks the whole router for a removed expert, in any layer (`coverage`), gets the full model's "
    "output up to float32 rounding. For others the rate of disagreement is bounded, for rows drawn "
    "like the verification rows and for no others."
)
SHARES = (
    CUT + "A token's weights are shares of all experts that are left, so all of them grow and no "
    "row keeps the full model's output, those without a violation (`coverage`) included. The rate "
    "of disagreement is bounded for rows drawn like the verification rows and for no others."
)
ALONE = RENORMALISED.replace(
    "A token's weights add up to 1 whatever experts there are", "A token's weights are each its own"
)
STATEMENTS = {
    "softmax_then_top_k_renormalised": RENORMALISED,
    "softmax_then_top_k": SHARES,
    "sigmoid_then_top_k_renormalised": RENORMALISED,
    "sigmoid_then_top_k": ALONE,
}


class RowReader(nnx.Module):
    """A decoder (`backbones.decoder`) as a function of the rows of one task.

    number: the task's in the data, for routers that know tasks.
    """

    def __init__(self, model: Any, task: str, number: int = 0):
        self.model, self.tasks, self.number = model, (task,), number

    def __call__(self, rows_B2T: Array, tasks: Sequence[str] | None = None) -> MultiTaskOutput:
        """float32 logits [B, T, V] where an answer's token follows, else 0."""
        tokens_BT, asked_BT = rows_B2T[:, 0], rows_B2T[:, 1] > 0
        mask_BT = tokens_BT >= 0
        context = Context(self.number, mask_BT=mask_BT, path="model")
        x_BTD = self.model.features(jnp.maximum(tokens_BT, 0), context).x_BTD
        logits_BTV = self.model.logits(x_BTD, context.within("head"))
        found = jnp.where((mask_BT & asked_BT)[..., None], logits_BTV, 0.0)
        return MultiTaskOutput({self.tasks[0]: found}, {}, context.records)


def decoder_path(reader: RowReader, task: str, reads: InputSpec) -> TaskPath:
    """The path of a decoder's task: updates that the task decides are added to matrices.

    Blocks of ranks among which tokens choose are experts like any others.
    """
    own = copy_of(reader)
    folded = fold_decided(own, reader.number)
    routed_updates(own)
    path = task_path.task_path(own, task, reads, number=reader.number)
    dense = {name: dense_layer(size) for name, size in folded.items()}
    return replace(path, mixtures={**path.mixtures, **dense})


class AnswerScores(ByTask):
    """`ByTask` of one task whose rows are one document each; a label is `targets` alone."""

    def count(self, logits_BHWC: Array, label: Any, valid_B: Array | None = None) -> State:
        """Sums of one batch from logits [B,T,V] and targets int32 [B,T], -1 where there is none."""
        rows = {"targets": label, "segments": jnp.ones_like(label), "task": jnp.zeros_like(label)}
        return super().count(logits_BHWC, rows, valid_B)


def answered(logits_BTV: Array) -> Array:
    """The likeliest token wherever a `RowReader` gives logits, int32 [B,T]; -1 elsewhere."""
    given_BT = jnp.any(logits_BTV != 0, axis=-1)
    return jnp.where(given_BT, jnp.argmax(logits_BTV, axis=-1), -1).astype(jnp.int32)


def share_of_other_tokens(first_BT: Array, second_BT: Array) -> Array:
    """Percentage of an answer's tokens of which another one is the likeliest, float32 [B]."""
    asked_BT = (first_BT >= 0) | (second_BT >= 0)
    differs = jnp.sum(asked_BT & (first_BT != second_BT), axis=1, dtype=jnp.float32)
    return 100 * differs / jnp.maximum(jnp.sum(asked_BT, axis=1), 1)


TOKENS = TaskOutput(
    "tokens",
    "token id",
    share_of_other_tokens,
    "another token is the likeliest at more than {} % of an answer's tokens",
    levels=(0.0, 5.0, 10.0, 50.0),
)


def answer_loss(logits_BTV: Array, targets_BT: Array, valid_B: Array | None = None) -> Array:
    """Cross-entropy of the answers' tokens."""
    asked_BT = only_rows(targets_BT >= 0, valid_B)
    return cross_entropy(logits_BTV, jnp.where(asked_BT, targets_BT, -1))


@dataclass(frozen=True)
class Writing:
    """Paints tokens as the text that they are, for pages and pictures."""

    tokenizer: Tokenizer

    def __call__(self, tokens_T: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3]."""
        ids = [int(i) for i in np.ravel(tokens_T) if i >= 0]
        # A place for what cannot be shown, such as half of a letter.
        plain = " ".join(self.tokenizer.decode(ids).split())
        text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in plain)
        return drawing.captioned(np.zeros((1, WIDTH, 3), np.uint8), text, LETTERS)


WIDTH, LETTERS = 132, 11  # pixels of a picture of a text, as wide as a page shows one


def answers(task: str, vocabulary: int, headline: str, writing: Writing) -> Task:
    """The task of this name on rows, as a path on them is scored, and learns what it has lost."""
    return Task(
        name=task,
        channels=vocabulary,
        loss=answer_loss,
        metric=AnswerScores((task,)),
        headline=headline,
        lower_is_better=headline == "loss",
        weight=1.0,
        postprocess=answered,
        picture=WordKey(writing),
        label=ROWS,
        scored_on=TARGETS,
        output=TOKENS,
    )


class RowsOfTask:
    """The examples of one task, each a row of its own (`data.source.Source`)."""

    def __init__(self, rows: Padded, task: str):
        told = rows.info
        if task not in told.tasks:
            raise unknown("task of this data", task, list(told.tasks))
        self.rows = rows
        self.places = np.flatnonzero(rows.documents.task_N == told.tasks.index(task))
        if not len(self.places):
            raise UserError(
                f"The {told.split} examples have none of task {task} that fits in {told.length} "
                "tokens: give others, or longer rows (--length)."
            )
        form, kinds = (1, told.length), {TARGETS: ROWS}
        self.info = Info(told.name, told.split, form, (TARGETS,), {}, kinds=kinds)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> SourceExample:
        row = self.rows[int(self.places[index])]
        tokens = np.where(row["segments"] > 0, row["tokens"], -1)
        asked = row["targets"] >= 0
        return {ROW: np.stack([tokens, asked]).astype(np.int32), TARGETS: row["targets"]}


@dataclass(frozen=True)
class RowPaths:
    """A decoder whose paths read rows of one task (`deploy.exporter.Exporter`).

    number: the task's in the data, for routers that know tasks.
    """

    data: TextDataConfig
    task: str
    number: int = 0

    @property
    def input(self) -> InputSpec:
        layout = "token ids with -1 behind them, and 1 where an answer's token follows"
        return InputSpec(ROW, "rows", (2, self.data.length), layout, dtype="int32")

    def check(self, task: str | None) -> None:
        """Every task can be cut."""

    def open(self, split: str) -> RowsOfTask:
        return RowsOfTask(open_rows(self.data, split), self.task)

    def identity(self) -> Mapping[str, Any]:
        """The data section with hashes of its files' content in the place of their names."""
        data = self.data
        files = {"train_file": data.train_file, "test_file": data.test_file}
        if data.tokenizer is not None:
            files["tokenizer"] = str(Path(data.tokenizer) / "tokenizer.json")
        hashes = {name: _hash(file) for name, file in files.items() if file is not None}
        return asdict(data) | {"task": self.task} | hashes

    def stack(
        self, examples: Sequence[SourceExample], tasks: Sequence[str], info: Info
    ) -> dict[str, np.ndarray]:
        made = {name: np.stack([example[name] for example in examples]) for name in (ROW, TARGETS)}
        # What is learned has the task's name (`deploy.recover`).
        return {self.task: made[TARGETS]} | made

    def subject(self, run: Loaded, classes: Classes) -> Subject:
        headline = "exact_match" if self.data.trained == "answers" else "loss"
        config = run.model.config
        task = answers(self.task, config.vocabulary, headline, self.writing)
        return Subject(
            RowReader(run.model, self.task, self.number),
            {self.task: task},
            cut=decoder_path,
            removals={"cut": task_path.rerouted},
            statements={self.task: STATEMENTS[config.experts.selection]},
            # A tied head is the embedding's table, which tokens are read with, too.
            head=lambda task: "model/embed" if config.tied_head else "model/lm_head",
        )

    @property
    def writing(self) -> Writing:
        """Tokens as text."""
        return Writing(tokenizer_of(self.data))

    def picture(self, example: np.ndarray) -> np.ndarray:
        return self.writing(example[0])


def exporters(config: Any) -> dict[str, RowPaths] | None:
    """By task of a text's data who makes its path; None for a run on something else."""
    data = config.data
    if not isinstance(data, TextDataConfig):
        return None
    return {name: RowPaths(data, name, number) for number, name in enumerate(tasks_of(data))}


def _hash(file: str) -> str:
    """Of a file's content."""
    with open(Path(file).expanduser(), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
