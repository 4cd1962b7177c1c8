"""How much each expert matters to a task, and which to keep under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations
from math import comb

import numpy as np

from moezoo.deploy.usage import Usage, removal_errors, weighted_mean_outputs
from moezoo.errors import UserError, unknown

Score = Callable[[Usage], np.ndarray]  # float64 [E], larger = keep
Kept = dict[str, tuple[int, ...]]  # layer -> kept experts, ascending
SUBSETS = 20_000  # enumerate subsets up to this many, then search greedily


def frequency(usage: Usage) -> np.ndarray:
    """How many tokens chose the expert (Z-code M3, arXiv:2109.10465)."""
    return np.asarray(usage.count_E)


def gate_sum(usage: Usage) -> np.ndarray:
    """Sum of the weights it was chosen with (SEER-MoE's soft count, arXiv:2404.05089)."""
    return np.asarray(usage.gate_E)


def reap(usage: Usage) -> np.ndarray:
    """Sum of weight times output norm (REAP, arXiv:2510.13999, summed for task-specific use)."""
    return np.asarray(usage.gated_norm_E)


def residual(usage: Usage) -> np.ndarray:
    """Squared layer error of replacing this expert alone by its mean output."""
    return np.diagonal(removal_errors(usage, weighted_mean_outputs(usage))).copy()


def random(usage: Usage) -> np.ndarray:
    """The baseline every score must beat: a shuffle of the experts, another one in every layer."""
    # Seeded by what was counted: the same where a calibration is repeated.
    counts = np.asarray(usage.count_E, np.int64)
    return np.random.default_rng(counts).permutation(len(counts)).astype(np.float64)


SCORES: dict[str, Score] = {
    "frequency": frequency,
    "gate_sum": gate_sum,
    "reap": reap,
    "residual": residual,
    "random": random,
}
SELECTIONS = (*SCORES, "gram")


def uniform(layers: Mapping[str, Usage], score: str, keep: int) -> Kept:
    """Keep the `keep` best experts of every layer; equal scores prefer the lower index.

    `score` is a key of SCORES, or "gram": the subset of least exact layer error.
    Raises UserError for an unknown score or a budget outside 1..E.
    """
    for name, usage in layers.items():
        if not 1 <= keep <= len(usage.count_E):
            raise UserError(
                f"Cannot keep {keep} experts in layer {name}: it has {len(usage.count_E)}, "
                f"so --keep must lie between 1 and {len(usage.count_E)}."
            )
    if score == "gram":
        return {name: least_error(usage, keep) for name, usage in layers.items()}
    chosen = by_name(score)
    return {name: _best(chosen(usage), keep) for name, usage in layers.items()}


def spread(layers: Mapping[str, Usage], score: str, total: int, floor: Mapping[str, int]) -> Kept:
    """Keep `total` experts over all layers: each layer's `floor` best, then the largest shares.

    Scores are divided by their layer's sum first, so that layers compare. Raises UserError when
    the total is below the floors or above the number of experts.
    """
    chosen = by_name(score)
    share = {name: _shares(chosen(usage)) for name, usage in layers.items()}
    lowest, most = sum(floor[name] for name in layers), sum(len(s) for s in share.values())
    if not lowest <= total <= most:
        raise UserError(
            f"Cannot keep {total} experts over {len(layers)} layers: the total must lie between "
            f"{lowest} (the floor of every layer) and {most} (all experts)."
        )
    kept = {name: set(_best(share[name], floor[name])) for name in layers}
    rest = [(-s[e], name, e) for name, s in share.items() for e in range(len(s))]
    # Ties by layer and number: the same data give the same plan.
    for _, name, expert in sorted(rest):
        if sum(map(len, kept.values())) == total:
            break
        kept[name].add(expert)
    return {name: tuple(sorted(experts)) for name, experts in kept.items()}


def used(layers: Mapping[str, Usage], percent: float, chosen: Mapping[str, int]) -> Kept:
    """Keep what a task uses: experts whose share of the layer's choices is above `percent` / k %.

    `chosen` is k of every layer; at least the k most used experts stay. Mod-Squad
    (arXiv:2212.08066), which averages usage over training steps, where calibration data decide
    here.
    """
    return {
        name: above(_shares(frequency(usage)) * 100, percent / chosen[name], chosen[name])
        for name, usage in layers.items()
    }


def above(score_E: np.ndarray, threshold: float, least: int) -> tuple[int, ...]:
    """The experts that score above `threshold`, and at least the `least` best."""
    over = {int(e) for e in np.flatnonzero(score_E > threshold)}
    return tuple(sorted(over | set(_best(score_E, least))))


def by_name(score: str) -> Score:
    """The score called `score`; raises UserError with the nearest names."""
    if score not in SCORES:
        raise unknown("score", score, list(SELECTIONS))
    return SCORES[score]


def least_error(usage: Usage, keep: int) -> tuple[int, ...]:
    """The kept set whose removed rest has the least exact layer error (means in its place).

    All subsets where there are few, otherwise greedy removal and one pass of swaps.
    """
    error_EE = removal_errors(usage, weighted_mean_outputs(usage))
    e = len(error_EE)
    if comb(e, keep) <= SUBSETS:
        candidates = (set(range(e)) - set(kept) for kept in combinations(range(e), keep))
        removed = min(candidates, key=lambda out: _error(error_EE, out))
    else:
        removed = _swapped(error_EE, _greedy(error_EE, e - keep))
    return tuple(sorted(set(range(e)) - removed))


def _error(error_EE: np.ndarray, removed: set[int]) -> float:
    index = sorted(removed)
    return float(error_EE[np.ix_(index, index)].sum())


def _greedy(error_EE: np.ndarray, count: int) -> set[int]:
    removed: set[int] = set()
    for _ in range(count):
        rest = sorted(set(range(len(error_EE))) - removed)
        removed.add(min(rest, key=lambda e: _error(error_EE, removed | {e})))
    return removed


def _swapped(error_EE: np.ndarray, removed: set[int]) -> set[int]:
    for out in sorted(removed):
        for candidate in sorted(set(range(len(error_EE))) - removed):
            changed = removed - {out} | {candidate}
            if _error(error_EE, changed) < _error(error_EE, removed):
                removed = changed
                break
    return removed


def _best(score_E: np.ndarray, keep: int) -> tuple[int, ...]:
    order = np.argsort(-score_E, kind="stable")[:keep]
    return tuple(sorted(int(e) for e in order))


def _shares(score_E: np.ndarray) -> np.ndarray:
    return score_E / max(float(score_E.sum()), 1e-30)
