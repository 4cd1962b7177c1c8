"""Evaluation: every example once, metric sums per task, expert usage per task and layer.

Also which of a run's evaluations is its best: one number from the scores of all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moezoo.nn import module
from moezoo.nn.moe import Record
from moezoo.ops import balance
from moezoo.ops.exact import exact_product
from moezoo.ops.routing import dense_weights, only
from moezoo.tasks.base import State, Task, merge

Tree = dict[str, Any]


class Evaluation(NamedTuple):
    """What one pass over a data set gives.

    `scores[task][name]` are the metric's scores; `usage[layer]` counts the (token, expert)
    choices of each task's tokens, int64 [J, E]; `totals[task]` are the metric's sums.
    """

    scores: dict[str, dict[str, float]]
    usage: dict[str, np.ndarray]
    totals: dict[str, State]

    def headline(self, tasks: Sequence[Task]) -> dict[str, float]:
        """`{"depth/rmse": 0.4, ...}`: the one score per task that tables show."""
        return {f"{t.name}/{t.headline}": self.scores[t.name][t.headline] for t in tasks}


def usage_by_task(record: Record, tasks: int) -> jax.Array:
    """How often each task's real tokens chose each expert, int32 [J, E].

    Where every token has every expert the sums of the weights instead, float32.
    """
    routing, task_N = record.routing, record.task_N
    experts = routing.probs_NE.shape[1]
    if routing.experts_NK.shape[1] == experts:
        # A product: by task for itself it would be J N E E numbers.
        mine_JN = (jnp.arange(tasks)[:, None] == task_N) & routing.mask_N
        return exact_product(mine_JN.astype(jnp.float32), dense_weights(routing, experts))

    def of_task(task: jax.Array) -> jax.Array:
        return balance.choice_counts(only(routing, task_N == task))

    return jax.vmap(of_task)(jnp.arange(tasks))


def make_count(
    definition: Any,
    tasks: Sequence[Task],
    read: Callable[..., Any],
    groups: int | None = None,
) -> Callable:
    """A jitted `(params, stats, batch) -> (counts, usage, logits of host metrics)`.

    `read` and `groups` as for `step.make_loss`.
    """
    count_of = groups or len(tasks)

    def count(params: Tree, stats: Tree, batch: Mapping[str, jax.Array]):
        model = module.merge(definition, params, stats)
        output = read(model, batch, train=False)
        counts, kept = {}, {}
        for task in tasks:
            logits = output.predictions[task.name]
            if task.metric.on_host:
                kept[task.name] = logits
            else:
                counts[task.name] = task.metric.count(logits, batch[task.truth], batch["valid"])
        usage = {name: usage_by_task(r, count_of) for name, r in output.records.items()}
        return counts, usage, kept

    return jax.jit(count)


def to_host(tree: Any) -> Any:
    """NumPy arrays of a tree of global arrays, also where other hosts hold parts of them.

    All processes take part.
    """

    def fetch(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


def evaluate(
    count: Callable,
    params: Tree,
    stats: Tree,
    tasks: Sequence[Task],
    batches: Iterable[Mapping[str, Any]],
    progress: Callable[[int], None] = lambda rows: None,
) -> Evaluation:
    """Run `count` (of `make_count`) over placed batches and turn the sums into scores.

    Batches hold `image`, `valid` and every task's `truth`.
    """
    totals = {task.name: task.metric.init() for task in tasks}
    usage: dict[str, np.ndarray] = {}
    for batch in batches:
        counts, used, kept = to_host(count(params, stats, batch))
        for task in tasks:
            if task.metric.on_host:
                label, valid = to_host((batch[task.truth], batch["valid"]))
                part = task.metric.count(kept[task.name], label, valid)
            else:
                part = counts[task.name]
            totals[task.name] = merge(totals[task.name], part)
        for layer, counts_JE in used.items():
            wide = np.int64 if counts_JE.dtype.kind == "i" else np.float64
            usage[layer] = usage.get(layer, 0) + counts_JE.astype(wide)
        progress(int(to_host(batch["valid"]).sum()))
    scores = {task.name: task.metric.compute(totals[task.name]) for task in tasks}
    return Evaluation(scores, module.in_order(usage), totals)


def rank(
    headlines: Mapping[str, float],
    rows: Sequence[Mapping[str, Any]],
    lower_is_better: Mapping[str, bool],
) -> float | None:
    """The mean gain over the tasks' first scores, higher for a better model; 0 for the first.

    `rows` are the run's evaluations so far in order, this one included; a score that was no finite
    number is null or missing there. A gain is relative to the task's first score as in Delta_m
    (`tasks.delta`); where that is 0, as exact match and mIoU often are, it is the score itself. A
    task that has no number counts 0 as long as it never had one, and -1, the loss of everything,
    after that. None where no task ever had a number.
    """
    firsts = {name: _first(rows, name) for name in headlines}
    if all(first is None for first in firsts.values()):
        return None
    gains = [_gain(headlines[name], firsts[name], lower_is_better[name]) for name in headlines]
    return sum(gains) / len(gains)


def _first(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    numbers = (row.get(name) for row in rows)
    finite = (float(x) for x in numbers if isinstance(x, int | float) and math.isfinite(x))
    return next(finite, None)


def _gain(score: float, first: float | None, lower: bool) -> float:
    if first is None:
        return 0.0
    if not math.isfinite(score):
        return -1.0
    gain = (score - first) / (abs(first) or 1.0)
    return -gain if lower else gain
