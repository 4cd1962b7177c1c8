"""Evaluations of a run are ranked whatever the first of them scored."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moezoo.tasks.delta import delta_m
from moezoo.train.evaluate import rank

LOWER = {"lm/exact_match": False, "depth/rmse": True}


def ranks(*scores: dict[str, float]) -> list[float | None]:
    """Each evaluation ranked when it was made."""
    rows: list[dict[str, Any]] = []
    found = []
    for one in scores:
        rows.append({k: v if math.isfinite(v) else None for k, v in one.items()})
        found.append(rank(one, rows, LOWER))
    return found


def match(*values: float) -> list[dict[str, float]]:
    return [{"lm/exact_match": value} for value in values]


def test_a_first_score_of_0_is_no_obstacle() -> None:
    found = ranks(*match(0.0, 0.0, 0.4, 0.1))
    assert found == [0.0, 0.0, pytest.approx(0.4), pytest.approx(0.1)]


def test_where_no_score_is_0_it_is_delta_m() -> None:
    first = {"lm/exact_match": 0.2, "depth/rmse": 2.0}
    later = {"lm/exact_match": 0.3, "depth/rmse": 1.0}
    assert ranks(first, later) == [0.0, pytest.approx(delta_m(later, first, LOWER))]


def test_one_task_at_0_leaves_the_other_its_say() -> None:
    first = {"lm/exact_match": 0.0, "depth/rmse": 2.0}
    better = {"lm/exact_match": 0.0, "depth/rmse": 1.0}
    best = {"lm/exact_match": 0.1, "depth/rmse": 1.0}
    found = ranks(first, better, best)
    assert found == sorted(found) and len(set(found)) == 3


def test_negative_scores_grow_upwards() -> None:
    found = ranks(*match(-2.0, -1.0, -3.0))
    assert found[2] < found[0] < found[1]


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
def test_what_has_no_number(nothing: float) -> None:
    """Never: no rank. At first: ranked from the first number on. Later: the worst."""
    assert ranks(*match(nothing, nothing)) == [None, None]
    assert ranks(*match(nothing, 0.5, 0.75)) == [None, 0.0, 0.5]
    found = ranks(*match(0.5, nothing, 0.1))
    assert found[1] < found[2] < found[0]
    assert all(value is None or math.isfinite(value) for value in found)


def test_a_task_that_is_never_measured_does_not_hide_the_others() -> None:
    found = ranks(*({"lm/exact_match": x, "depth/rmse": math.nan} for x in (0.0, 0.2)))
    assert found == [0.0, pytest.approx(0.1)]
