"""How much each expert matters to a task, and which to keep under a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

from moezoo.deploy.usage import Usage, output_variance, removal_errors, weighted_mean_outputs
from moezoo.errors import UserError, unknown

Score = Callable[[Usage], np.ndarray]  # float64 [E], larger = keep
Kept = dict[str, tuple[int, ...]]  # layer -> kept experts, ascending
SUBSETS = 20_000  # enumerate subsets up to this many, then search greedily


class Candidates(NamedTuple):
    """A layer that experts are chosen in.

    usage: what the calibration saw.   within: the experts that a token can ask for, ascending.
    chosen: how many a token asks for.
    """

    usage: Usage
    within: tuple[int, ...]
    chosen: int


Layers = Mapping[str, Candidates]


def frequency(usage: Usage) -> np.ndarray:
    """How many tokens chose the expert (Z-code M3, arXiv:2109.10465)."""
    return np.asarray(usage.count_E)


def gate_sum(usage: Usage) -> np.ndarray:
    """Sum of the weights it was chosen with (SEER-MoE's soft count, arXiv:2404.05089)."""
    return np.asarray(usage.gate_E)


def reap(usage: Usage) -> np.ndarray:
    """Sum of weight times output norm (REAP, arXiv:2510.13999, summed for task-specific use)."""
    return np.asarray(usage.gated_norm_E)


def reap_mean(usage: Usage) -> np.ndarray:
    """REAP as published (arXiv:2510.13999): the mean of weight times output norm over the tokens
    that chose the expert. Blind to how many those are."""
    return np.asarray(usage.gated_norm_E / np.maximum(usage.count_E, 1.0))


def mone(usage: Usage) -> np.ndarray:
    """MoNE (arXiv:2507.00390): the deviation of the expert's output times the mean weight it got.

    The form is its published code's `fusion`: the norm over features of the deviations.
    """
    return np.sqrt(output_variance(usage)) * usage.gate_E / max(float(usage.tokens), 1.0)


def importance(usage: Usage) -> np.ndarray:
    """NLLB-200's (arXiv:2212.09811): the share of tokens that chose the expert first, times e to
    the mean probability that they gave it."""
    first_E = np.maximum(usage.first_E, 1.0)
    share_E = usage.first_E / max(float(usage.tokens), 1.0)
    return share_E * np.exp(usage.first_prob_E / first_E)


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
    "reap_mean": reap_mean,
    "mone": mone,
    "importance": importance,
    "residual": residual,
    "random": random,
}
SELECTIONS = (*SCORES, "gram")


def uniform(layers: Layers, score: str, keep: int) -> Kept:
    """Keep the `keep` best experts of every layer; equal scores prefer the lower index.

    `score` is a key of SCORES, or "gram": the subset of least exact layer error. A layer in whose
    reach there are fewer keeps those. Raises UserError for an unknown score or a budget outside
    1..E.
    """
    for name, layer in layers.items():
        if not 1 <= keep <= len(layer.usage.count_E):
            raise UserError(
                f"Cannot keep {keep} experts in layer {name}: it has {len(layer.usage.count_E)}, "
                f"so --keep must lie between 1 and {len(layer.usage.count_E)}."
            )
    if score == "gram":
        return {name: least_error(layer, keep) for name, layer in layers.items()}
    chosen = by_name(score)
    return {name: _best(chosen(layer.usage), keep, layer.within) for name, layer in layers.items()}


def spread(layers: Layers, score: str, total: int) -> Kept:
    """Keep `total` experts over all layers: each layer's k best, then the largest shares.

    Scores are divided by their layer's sum first, so that layers compare. Raises UserError when
    the total is below the floors or above the number of experts.
    """
    lowest = sum(layer.chosen for layer in layers.values())
    most = sum(len(layer.within) for layer in layers.values())
    if not lowest <= total <= most:
        raise UserError(
            f"Cannot keep {total} experts over {len(layers)} layers: the total must lie between "
            f"{lowest} (the floor of every layer) and {most} (all experts)."
        )
    orders = removals(layers, score, {name: 1.0 for name in layers})
    gone = {(name, e) for name, e in orders[: most - total]}
    return {
        name: tuple(e for e in layer.within if (name, e) not in gone)
        for name, layer in layers.items()
    }


def removals(layers: Layers, score: str, price: Mapping[str, float]) -> list[tuple[str, int]]:
    """The experts in the order in which they leave, as (layer, id); each layer's k best never do.

    First leaves what has the least share of its layer's score for its price (what an expert of
    the layer costs, in any unit). One order for all budgets: a smaller budget removes more.
    """
    chosen = by_name(score)
    ranked: list[tuple[float, str, int]] = []
    for name, layer in layers.items():
        share_E = _shares(chosen(layer.usage))
        floor = _best(share_E, layer.chosen, layer.within)
        ranked += [(share_E[e] / price[name], name, e) for e in layer.within if e not in floor]
    # Of equals the later one leaves first: the same data give the same plan.
    ranked.sort(key=lambda entry: entry[1:], reverse=True)
    return [(name, e) for _, name, e in sorted(ranked, key=lambda entry: entry[0])]


def cheapest(
    layers: Layers,
    score: str,
    price: Mapping[str, float],
    cost: Callable[[Kept], float],
    budget: float,
) -> Kept:
    """The first of the shrinking choices of `removals` that costs at most `budget`.

    cost: of a choice, in the unit of the budget.   Raises UserError where even each layer's k best
    cost more.
    """
    kept = {name: set(layer.within) for name, layer in layers.items()}

    def now() -> Kept:
        return {name: tuple(sorted(experts)) for name, experts in kept.items()}

    for name, expert in removals(layers, score, price):
        if cost(now()) <= budget:
            break
        kept[name].remove(expert)
    if cost(now()) > budget:
        raise UserError(
            f"The budget is {budget:,.0f}, but the path costs {cost(now()):,.0f} even with as few "
            "experts per layer as a token chooses: take a larger one."
        )
    return now()


def used(layers: Layers, percent: float) -> Kept:
    """Keep what a task uses: experts whose share of the layer's choices is above `percent` / k %.

    At least the k most used experts stay. Mod-Squad (arXiv:2212.08066), which averages usage over
    training steps, where calibration data decide here.
    """
    return {
        name: above(
            _shares(frequency(layer.usage)) * 100,
            percent / layer.chosen,
            layer.chosen,
            layer.within,
        )
        for name, layer in layers.items()
    }


def above(
    score_E: np.ndarray, threshold: float, least: int, within: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The experts that score above `threshold`, and at least the `least` best."""
    over = {int(e) for e in np.flatnonzero(score_E > threshold)}
    return tuple(sorted(over | set(_best(score_E, least, within))))


def by_name(score: str) -> Score:
    """The score called `score`; raises UserError with the nearest names."""
    if score == "gram":
        raise UserError(
            "--score gram chooses a fixed number of each layer's experts: give --keep, or another "
            "score."
        )
    if score not in SCORES:
        raise unknown("score", score, list(SELECTIONS))
    return SCORES[score]


def least_error(layer: Candidates, keep: int) -> tuple[int, ...]:
    """The kept set whose removed rest has the least exact layer error (means in its place).

    All subsets where there are few, otherwise greedy removal and one pass of swaps.
    """
    usage, within = layer.usage, layer.within
    error_EE = removal_errors(usage, weighted_mean_outputs(usage))[np.ix_(within, within)]
    e, keep = len(within), min(keep, len(within))
    if comb(e, keep) <= SUBSETS:
        candidates = (set(range(e)) - set(kept) for kept in combinations(range(e), keep))
        removed = min(candidates, key=lambda out: _error(error_EE, out))
    else:
        removed = _swapped(error_EE, _greedy(error_EE, e - keep))
    return tuple(within[i] for i in range(e) if i not in removed)


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


def _best(score_E: np.ndarray, keep: int, within: Sequence[int] | None = None) -> tuple[int, ...]:
    ids = np.arange(len(score_E)) if within is None else np.asarray(within, int)
    order = np.argsort(-score_E[ids], kind="stable")[:keep]
    return tuple(sorted(int(e) for e in ids[order]))


def _shares(score_E: np.ndarray) -> np.ndarray:
    return score_E / max(float(score_E.sum()), 1e-30)
