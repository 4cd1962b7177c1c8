"""Whether a paper's claim holds in what was measured: differences beside their own uncertainty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

HOLDS, DOES_NOT, UNKNOWN = "holds", "does not hold", "cannot be told"


class Claim(NamedTuple):
    """A paper says that `one` scores higher than `other`, or (level) at least as high.

    text: in whose words, told by what they are called in the table.
    """

    text: str
    one: str
    other: str
    level: bool = False


class Verdict(NamedTuple):
    """What was found of a claim.

    difference: of the scores, one less the other.   error: its standard error.
    """

    said: str
    difference: float
    error: float


def score_of(values: Sequence[float], examples: int) -> tuple[float, float]:
    """The mean score of several seeds and its standard error.

    The larger of two: the spread over seeds, and what so many test examples leave open, which are
    the same for all seeds. With one seed the second alone is known, so the spread is missing.
    """
    mean = sum(values) / len(values)
    sampled = math.sqrt(max(mean * (1 - mean), 0.25 / examples) / examples)
    if len(values) < 2:
        return mean, sampled
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return mean, max(sampled, math.sqrt(variance / len(values)))


def verdict(claim: Claim, scores: Mapping[str, tuple[float, float]]) -> Verdict | None:
    """What the scores, (mean, standard error) by name, say of a claim; None where one is missing.

    Two standard errors of the difference decide. Scores of the same test examples vary together,
    which would make the error smaller: what cannot be told may only be more than it should.
    """
    if claim.one not in scores or claim.other not in scores:
        return None
    (one, first), (other, second) = scores[claim.one], scores[claim.other]
    difference, error = one - other, math.hypot(first, second)
    if difference < -2 * error:
        said = DOES_NOT
    elif difference > 2 * error:
        said = HOLDS
    else:
        # As good as: no difference that could be seen, where one of 0.1 would have been.
        said = HOLDS if claim.level and 2 * error <= 0.1 else UNKNOWN
    return Verdict(said, difference, error)


def claim_lines(
    claims: Sequence[Claim], scores: Mapping[str, tuple[float, float]], seeds: int
) -> list[tuple[str, str, str]]:
    """(claim, difference, verdict) of every claim that was measured.

    seeds: how many the scores are of, at least; with one the verdict is about that seed.
    """
    only = ", in one seed" if seeds < 2 else ""
    found = ((claim, verdict(claim, scores)) for claim in claims)
    return [
        (claim.text, f"{told.difference:+.3f} ± {told.error:.3f}", told.said + only)
        for claim, told in found
        if told is not None
    ]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
