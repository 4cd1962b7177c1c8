"""Which of a run's evaluations is its best: one number from the scores of all tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


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
