"""The certificate of a task path: what is proved or measured about it, as plain data.

A whole path is exact. Of a pruned one the rate of disagreement is measured on examples that chose
nothing, and bounded (`at_most`): a rate of 0 among 100 examples promises less than among 10,000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.compare import Compared, check_finite, total
from moezoo.deploy.path import TaskPath
from moezoo.deploy.splits import Subset
from moezoo.deploy.usage import RELIABLE
from moezoo.nn import module
from moezoo.tasks import output
from moezoo.tasks.base import State, Task


def at_most(events: int, trials: int, level: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound on a rate after `events` in `trials`.

    Holds with probability `level` for data exchangeable with the trials. 1.0 without any trial.
    """
    if not 0 <= events <= trials:
        raise ValueError(f"{events} events in {trials} trials")
    if events == trials:
        # The beta distribution has no parameter 0.
        return 1.0
    from scipy.stats import beta  # more than a second, which loading a model need not pay

    return float(beta.ppf(level, events + 1, trials - events))


RESAMPLES = 500
EXACT = (
    "No expert was removed. The path gives the full model's single-task output: other tasks' "
    "routers, embeddings and heads, which it never reads, are gone."
)
SUPPORT = (
    "No expert was removed that any token of this task can ask for: the others lay outside of the "
    "task's support. The path gives the full model's single-task output, whatever the input."
)
PRUNED = (
    "{novices} The routers keep all columns. An image with zero violations gets the full model's "
    "output: the same operations on the same numbers, and the same bits where the compiler joins "
    "the operations of both alike (`clean_but_not_bit_equal` counts where it did not). For others "
    "the rate of disagreement is bounded below, for images drawn like the verification images and "
    "for no others."
)
NOVICES = {
    "mean": "Removed experts are replaced by their mean outputs on the calibration data.",
    "affine": "Removed experts are replaced by maps of low rank, fitted on the calibration data.",
}
CUT = (
    "Routers have lost the columns of removed experts: a token that would have asked for one asks "
    "for another expert. An image with zero violations asks for none of them, yet its weights may "
    "differ where they are shares of all columns. The rate of disagreement is bounded below, for "
    "images drawn like the verification images and for no others."
)


LEARNED = (
    "{part} trained on the calibration examples after experts were removed (`recovery`), so no "
    "example keeps the full model's output, with or without violations. The rate of disagreement "
    "is bounded below, for examples drawn like those of the verification and for no others."
)


def statement(path: TaskPath) -> str:
    """What is promised of a path, in words."""
    if path.exact:
        return SUPPORT if any(layer.removed for layer in path.layers.values()) else EXACT
    if path.plan.novices == "cut":
        return CUT
    return PRUNED.format(novices=NOVICES[path.plan.novices.partition(":")[0]])


def contents(path: TaskPath) -> dict[str, Any]:
    """What the path consists of."""
    return {
        "task": path.task,
        "kind": "exact" if path.exact else "pruned",
        "statement": statement(path),
        "layers": path.report,
        "plan": {
            "score": path.plan.score,
            "budget": path.plan.budget,
            "novices": path.plan.novices,
            "hash": path.plan.digest(),
        },
        "removed_arrays": len(path.absent),
        "removed_scalars": sum(math.prod(a.shape) for a in path.absent.values()),
    }


def apart(model: Any, path: TaskPath, given: np.ndarray) -> dict[str, Any]:
    """How far the path's logits are from the full model's, measured on a few examples.

    model: `(given, tasks)` to a `MultiTaskOutput`. given: a batch of what both read.
    Raises UserError where one of them gives numbers that are not finite.
    """
    parts = module.split(model)

    @jax.jit
    def full(params: Any, stats: Any, given: Any) -> Any:
        whole = module.merge(parts.definition, params, stats)
        return whole(given, tasks=(path.task,)).predictions[path.task]

    wanted = np.asarray(full(parts.params, parts.stats, given))
    found = np.asarray(path(given).logits)
    check_finite(path.task, wanted, found)
    return {
        "parameters": module.count(parts.params) + module.count(parts.stats),
        path.input.unit: len(given),
        "largest_logit": float(np.abs(wanted).max()),
        "largest_difference": float(np.abs(found - wanted).max()),
    }


def calibration(found: Calibration, part: Subset, path: TaskPath) -> dict[str, Any]:
    """What the choice of experts rests on, and which stand-ins rest on little."""
    rare = {
        # Below, a stand-in rests on the other experts' means.
        name: [e for e in layer.missing if found.layers[name].count_E[e] < RELIABLE]
        for name, layer in path.layers.items()
    }
    return {
        **part.describe(),
        "tokens": int(next(iter(found.layers.values())).tokens),
        "kept_gate_share": {
            name: _share(found.layers[name].gate_E[list(layer.kept)], found.layers[name].gate_E)
            for name, layer in path.layers.items()
        },
        "removed_experts_seen_on_under_30_tokens": {k: v for k, v in rare.items() if v},
    }


def verification(found: Compared, part: Subset, path: TaskPath, task: Task) -> dict[str, Any]:
    """Coverage, and a bound on how often the path disagrees with the whole one."""
    return {
        **part.describe(),
        **agreement(found, task),
        "coverage_by_layer": {
            name: _mean(found.violations_IL[:, i] == 0) for i, name in enumerate(path.layers)
        },
        "kept_gate_share": _share(found.kept_gate_IL, found.gate_IL),
        "violations_per_image": _mean(found.violations_IL.sum(axis=1)),
        "clean_but_not_bit_equal": int(np.sum(found.clean_I & found.unequal_I)),
        "bound": "one-sided 95 % Clopper-Pearson, for each level by itself",
        "mean_difference": _mean(found.difference_I),
        "worst_difference": float(found.difference_I.max()),
    }


def agreement(found: Compared, task: Task) -> dict[str, Any]:
    """The share of images without violation, and bounds on how often predictions disagree."""
    kind = task.prediction
    return {
        "coverage": _mean(found.clean_I),
        "disagreement": [_disagreement(found, kind, level) for level in kind.levels],
    }


def _disagreement(found: Compared, kind: output.TaskOutput, level: float) -> dict[str, Any]:
    differs = found.difference_I > level
    return {
        "event": kind.event(level),
        "level": level,
        "trials": len(differs),
        "events": int(differs.sum()),
        "rate": _mean(differs),
        "rate_at_most": at_most(int(differs.sum()), len(differs)),
    }


def scores(found: Compared, part: Subset, task: Task, changes: np.ndarray) -> dict[str, Any]:
    """The task's metric of the whole and the cut path on images that nothing else used.

    changes: as `resampled_changes` gives them.
    """
    before, after = (total(task, states) for states in (found.whole, found.cut))
    whole, cut = task.metric.compute(before), task.metric.compute(after)
    change_I = _headlines(task, found.cut) - _headlines(task, found.whole)
    known = np.flatnonzero(np.isfinite(change_I))
    loss_I = change_I if task.lower_is_better else -change_I
    worst = known[np.argmax(loss_I[known])] if len(known) else None
    return {
        **part.describe(),
        "metric": task.headline,
        "lower_is_better": task.lower_is_better,
        "full": _finite(whole),
        "path": _finite(cut),
        "change": cut[task.headline] - whole[task.headline],
        "change_95": _interval(changes),
        "mean_image_change": float(change_I[known].mean()) if len(known) else None,
        "worst_image": None
        if worst is None
        else {"example": part.source.start + int(worst), "change": float(change_I[worst])},
        "worst_class": _worst_class(task, before, after),
    }


def _headlines(task: Task, states: list[State]) -> np.ndarray:
    return np.array([task.metric.compute(state)[task.headline] for state in states])


def _interval(changes: np.ndarray) -> list[float] | None:
    """95 % of the headline's change over resamples of the images."""
    return [float(q) for q in np.quantile(changes, [0.025, 0.975])] if len(changes) else None


def resampled_changes(task: Task, found: Compared) -> np.ndarray:
    """The headline's changes in resamples of the images (paired bootstrap), all finite."""
    rng, n = np.random.default_rng(0), len(found.whole)
    # States are sums, so a resample is a weighted sum of the images'. Both paths get the same
    # weights: what images differ in stays out of the change.
    draws = (rng.integers(0, n, n) for _ in range(RESAMPLES))
    times_RI = np.stack([np.bincount(d, minlength=n) for d in draws]).astype(np.float64)
    before, after = (_sums(times_RI, states) for states in (found.whole, found.cut))
    changes = _headlines(task, after) - _headlines(task, before)
    # A resample may lack what a metric divides by.
    return changes[np.isfinite(changes)]


def _sums(times_RI: np.ndarray, states: list[State]) -> list[State]:
    """The states' sums in every resample."""
    stacked = {
        key: np.tensordot(times_RI, np.stack([np.asarray(s[key], np.float64) for s in states]), 1)
        for key in states[0]
    }
    return [{key: sums[r] for key, sums in stacked.items()} for r in range(len(times_RI))]


def _worst_class(task: Task, before: State, after: State) -> dict[str, Any] | None:
    first, second = task.metric.per_class(before), task.metric.per_class(after)
    if first is None or second is None:
        return None
    change = second - first
    index = int(np.argmin(change))
    return {"class": index, "change": float(change[index])}


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else 0.0


def _share(part: np.ndarray, whole: np.ndarray) -> float:
    return float(np.sum(part, dtype=np.float64) / max(np.sum(whole, dtype=np.float64), 1e-30))
