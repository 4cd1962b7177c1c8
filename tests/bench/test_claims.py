"""Verdicts on papers' claims: what decides them, and what leaves them open."""

from __future__ import annotations

import math

import pytest

from moezoo.bench.claims import DOES_NOT, HOLDS, UNKNOWN, Claim, claim_lines, score_of, verdict

CLAIM = Claim("one is better", "one", "other")
LEVEL = Claim("one is as good", "one", "other", level=True)


@pytest.mark.parametrize(
    ("claim", "one", "other", "error", "says"),
    [
        (CLAIM, 0.6, 0.5, 0.02, HOLDS),
        (CLAIM, 0.5, 0.6, 0.02, DOES_NOT),
        (CLAIM, 0.55, 0.5, 0.02, UNKNOWN),
        (LEVEL, 0.5, 0.52, 0.02, HOLDS),
        (LEVEL, 0.5, 0.6, 0.02, DOES_NOT),
        (LEVEL, 0.5, 0.52, 0.1, UNKNOWN),  # a difference of 0.1 would not have been seen
    ],
)
def test_two_standard_errors_decide(
    claim: Claim, one: float, other: float, error: float, says: str
) -> None:
    scores = {"one": (one, error), "other": (other, error)}
    found = verdict(claim, scores)
    assert found is not None and found.said == says
    assert found.difference == pytest.approx(one - other)
    assert found.error == pytest.approx(error * math.sqrt(2))
    assert claim_lines([claim], scores, 2)[0][2] == says
    assert claim_lines([claim], scores, 1)[0][2] == f"{says}, in one seed"
    assert verdict(claim, {"one": (one, error)}) is None and not claim_lines([claim], {}, 2)


def test_errors_are_the_larger_of_examples_and_seeds() -> None:
    assert score_of([0.5], 100) == (0.5, pytest.approx(0.05))
    assert score_of([0.4, 0.6], 100) == (0.5, pytest.approx(0.1))
    assert score_of([0.5, 0.5, 0.5], 100) == (0.5, pytest.approx(0.05))
    assert score_of([0.0], 25)[1] > 0  # nobody right is no certainty
