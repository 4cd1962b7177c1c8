"""How a batch of several tasks becomes passes of the encoder: their logits and their decisions.

A batch is {task: its part}. What a part holds says what is predicted: `label`, a choice among fixed
candidates; `targets`, words at places of the text; neither, which text belongs to which image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.models.conditional_moe.conditions import ConditionTable
from moezoo.models.conditional_moe.model import ConditionalMoE, EncoderFeatures
from moezoo.models.conditional_moe.tokens import EncoderInputs
from moezoo.models.shared.multitask import MultiTaskOutput
from moezoo.nn.moe import Record
from moezoo.ops.routing import map_rows

TaskBatch = Mapping[str, Array]
ROWS = ("image", "text")  # of a condition with two rows


def groups(table: ConditionTable) -> tuple[str, ...]:
    """Who decides: every side of every task, its image and its text apart where they differ."""
    return tuple(
        name if row is None else f"{name} {row}"
        for name, entry in table.entries.items()
        for row in (ROWS if len(entry.rows_RA) == 2 else (None,))
    )


@dataclass(frozen=True)
class Reading:
    """How the tasks of a batch are read.

    candidates: int32 [C, T] of the tasks that choose. pad: the token that fills texts up.
    """

    candidates: Mapping[str, np.ndarray]
    pad: int

    def __call__(
        self,
        model: ConditionalMoE,
        batch: Mapping[str, TaskBatch],
        key: Array | None = None,
        train: bool = False,
    ) -> MultiTaskOutput:
        """The logits of each task of the batch, and the decisions of all passes by layer.

        Choice: [B, C]; words: [B, T, V]; partners: [B, B], images by texts.
        """
        predictions, passes = {}, []
        # In the table's order: a task's noise must not depend on how a batch is written down.
        names = [name for name in model.table.tasks if name in batch]
        for number, name in enumerate(names):
            own = None if key is None else jax.random.fold_in(key, number)
            encoder = _TaskEncoder(model, name, own, train, passes)
            predictions[name] = self._logits(encoder, batch[name])
        return MultiTaskOutput(predictions, {}, joined(passes))

    def _logits(self, encoder: _TaskEncoder, part: TaskBatch) -> Array:
        model = encoder.model
        if "label" in part:
            names = self.inputs(text=jnp.asarray(self.candidates[encoder.task]))
            query_BD = encoder.encode("input", self.inputs(**_given(part))).whole_BD
            return model.scores(query_BD, encoder.encode("target", names).whole_BD)
        if "targets" in part:
            read_BTD = encoder.encode("input", self.inputs(**_given(part))).text_BLD
            ids_V1 = jnp.arange(model.config.vocabulary)[:, None]
            return model.scores(
                read_BTD, encoder.encode("target", EncoderInputs(text_BL=ids_V1)).whole_BD
            )
        image_BD = encoder.encode("input", self.inputs(image=part["image"])).whole_BD
        text_BD = encoder.encode("target", self.inputs(text=part["text"])).whole_BD
        return model.scores(image_BD, text_BD)

    def inputs(self, image: Array | None = None, text: Array | None = None) -> EncoderInputs:
        """An image, a text, or both; padding is not looked at."""
        return EncoderInputs(image, text, None if text is None else text != self.pad)


def _given(part: TaskBatch) -> dict[str, Array]:
    return {name: part[name] for name in ("image", "text") if name in part}


@dataclass(frozen=True)
class _TaskEncoder:
    """Encodes for one task, and keeps the records of every pass in `passes`."""

    model: ConditionalMoE
    task: str
    key: Array | None
    train: bool
    passes: list[dict[str, Record]]

    def encode(self, side: str, inputs: EncoderInputs) -> EncoderFeatures:
        # A number for every pass: inputs and targets must not be disturbed alike.
        key = None if self.key is None else jax.random.fold_in(self.key, len(self.passes))
        name = f"{self.task}|{side}"
        read = self.model.encode(inputs, name, key=key, train=self.train)
        batch, tokens, _ = read.x_BTD.shape
        behind_N = jnp.tile(jnp.arange(tokens) >= read.split, batch)
        decided = {
            path: numbered(record, self.model.table, name, behind_N)
            for path, record in read.records.items()
        }
        self.passes.append(decided)
        return read


def numbered(record: Record, table: ConditionTable, name: str, behind_N: Array) -> Record:
    """The record with the numbers of `groups` for tasks.

    behind_N: bool, which tokens of the batch are behind the first part. A decision of rows counts
    once for each row of the condition, even if the level has one for both.
    """
    first, rows = groups(table).index(_first_group(table, name)), len(table.entry(name).rows_RA)
    decided = record.task_N.shape[0]
    if decided == behind_N.shape[0]:
        part_N = behind_N.astype(jnp.int32) if rows == 2 else jnp.zeros(decided, jnp.int32)
        return record._replace(task_N=first + part_N)
    routing = record.routing
    if decided < rows:
        routing = map_rows(lambda a: jnp.repeat(a, rows, axis=0), routing)
    part_N = jnp.minimum(jnp.arange(max(decided, rows)), rows - 1)
    return record._replace(routing=routing, task_N=first + part_N)


def _first_group(table: ConditionTable, name: str) -> str:
    return name if len(table.entry(name).rows_RA) == 1 else f"{name} {ROWS[0]}"


def joined(passes: Sequence[Mapping[str, Record]]) -> dict[str, Record]:
    """By layer, the decisions of all passes as those of one."""
    made = {}
    for path in dict.fromkeys(path for one in passes for path in one):
        records = [one[path] for one in passes if path in one]
        routing = map_rows(lambda *parts: jnp.concatenate(parts), *(r.routing for r in records))
        task_N = jnp.concatenate([r.task_N for r in records])
        dropped = sum((r.dropped for r in records), jnp.zeros((), jnp.int32))
        made[path] = Record(routing, task_N, dropped)
    return made
