"""A pruned path beside the whole one, example by example, on data that chose nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moezoo.deploy.path import PathLayer, TaskPath, violated
from moezoo.errors import UserError
from moezoo.ops.routing import Routing
from moezoo.tasks.base import State, Task, merge


class Compared(NamedTuple):
    """One row per image; layers in the order of the path's.

    violations_IL: tokens that asked for a removed expert.
    gate_IL, kept_gate_IL: sums of the routers' weights, of all choices and of the kept ones.
    difference_I: how far the predictions are apart, in the task's own measure (`tasks.output`).
    unequal_I: whether any logit differs in any bit (0.0 and -0.0 are the same).
    whole, cut: the task metric's state of each image by itself.
    """

    violations_IL: np.ndarray
    gate_IL: np.ndarray
    kept_gate_IL: np.ndarray
    difference_I: np.ndarray
    unequal_I: np.ndarray
    whole: list[State]
    cut: list[State]

    @property
    def clean_I(self) -> np.ndarray:
        """Images without any violation."""
        return self.violations_IL.sum(axis=1) == 0


class Tally(NamedTuple):
    """What a path gives for one batch of B rows, L layers.

    logits: float32.   violations_BL: int32, tokens that asked for an expert that is not there.
    gate_BL, kept_gate_BL: sums of the routers' weights, of all choices and of those of experts
    that are there.
    """

    logits: Array
    violations_BL: Array
    gate_BL: Array
    kept_gate_BL: Array


Runner = Callable[[Any], Tally]  # of a batch of a path's input


def compare(
    whole: TaskPath,
    cut: TaskPath,
    task: Task,
    batches: Iterable[Mapping[str, Any]],
    progress: Callable[[int], None] = lambda rows: None,
) -> Compared:
    """Run both paths on every valid row of `batches`, which hold input, truth and `valid`.

    Raises UserError where one of them gives numbers that are not finite: those agree with nothing.
    """
    (found,) = compare_all(whole, {"": runner(cut)}, task, batches, progress).values()
    return found


def compare_all(
    whole: TaskPath,
    cuts: Mapping[str, Runner],
    task: Task,
    batches: Iterable[Mapping[str, Any]],
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Compared]:
    """As `compare`, of several paths with one: `cuts` by any name."""
    run_whole, states = runner(whole), _states(task)
    kind = task.prediction
    apart = jax.jit(lambda a, b: kind.difference(task.postprocess(a), task.postprocess(b)))
    of_whole: list[State] = []
    of_cut: dict[str, list[State]] = {name: [] for name in cuts}
    rows: dict[str, list[tuple[np.ndarray, ...]]] = {name: [] for name in cuts}
    for batch in batches:
        given, valid = batch[whole.input.name], np.asarray(batch["valid"])
        label = np.asarray(batch[task.truth])[valid]
        # One path at a time: the logits of all of them may be more than fits.
        first = run_whole(given).logits
        for name, run in cuts.items():
            tally = run(given)
            logits = np.asarray(tally.logits)[valid]
            check_finite(task.name, np.asarray(first)[valid], logits)
            unequal = jnp.any(first != tally.logits, axis=tuple(range(1, first.ndim)))
            columns = (*tally[1:], apart(first, tally.logits), unequal)
            rows[name].append(tuple(np.asarray(c)[valid] for c in columns))
            of_cut[name] += states(logits, label)
        of_whole += states(np.asarray(first)[valid], label)
        progress(int(valid.sum()))
    return {name: _compared(rows[name], of_whole, of_cut[name]) for name in cuts}


def _compared(rows: list[tuple[np.ndarray, ...]], whole: list[State], cut: list[State]) -> Compared:
    violations, gate, kept, apart_I, unequal_I = map(np.concatenate, zip(*rows, strict=True))
    return Compared(violations, gate, kept, apart_I, unequal_I, whole, cut)


def check_finite(task: str, *logits: np.ndarray) -> None:
    """UserError where a path's outputs are not finite: no comparison says anything of those."""
    if not all(np.isfinite(array).all() for array in logits):
        raise UserError(
            f"The {task} path gives numbers that are not finite: its training diverged; take a "
            "checkpoint from before that."
        )


@lru_cache(maxsize=8)
def runner(path: TaskPath) -> Runner:
    """A path's program, kept by path: one is compared on several sets, and with several others."""

    def run(weights: Mapping[str, Any], given: Array) -> Tally:
        logits, routing = path.run(weights, given)
        b = given.shape[0]
        parts = [_layer(routing[name], layer, b) for name, layer in path.layers.items()]
        columns = zip(*parts, strict=True) if parts else [[]] * 3
        empty = jnp.zeros((b, 0))
        stacked = (jnp.stack(c, axis=1) if parts else empty for c in columns)
        return Tally(logits, *stacked)

    return partial(jax.jit(run), path.weights)


def _layer(routing: Routing, layer: PathLayer, b: int) -> tuple[Array, Array, Array]:
    """Violations, gate mass and kept gate mass of one layer, each [B]."""
    # With a type: an empty tuple would be an array of floats.
    gone_NK = jnp.any(routing.experts_NK[..., None] == jnp.asarray(layer.missing, int), axis=-1)
    kept_NK = jnp.where(gone_NK, 0.0, routing.weights_NK)
    return (
        violated(routing, layer.missing, b),
        routing.weights_NK.reshape(b, -1).sum(1),
        kept_NK.reshape(b, -1).sum(1),
    )


def _states(task: Task) -> Callable[[np.ndarray, np.ndarray], list[State]]:
    """(logits, label) of a batch -> the metric's state of each image."""
    count: Callable[..., State] = task.metric.count
    if task.metric.on_host:
        return lambda logits, label: [
            count(logits[i : i + 1], label[i : i + 1]) for i in range(len(logits))
        ]
    # Each image a batch of one, because a state sums over its batch.
    each = jax.jit(jax.vmap(lambda logits, label: count(logits[None], label[None])))

    def states(logits: np.ndarray, label: np.ndarray) -> list[State]:
        batch = jax.device_get(each(logits, label))
        return [{k: v[i] for k, v in batch.items()} for i in range(len(logits))]

    return states


def total(task: Task, states: list[State]) -> State:
    """The metric's state of all images together."""
    summed = task.metric.init()
    for state in states:
        summed = merge(summed, state)
    return summed
