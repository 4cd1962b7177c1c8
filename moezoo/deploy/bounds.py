"""What a number of observed events says about their rate."""

from __future__ import annotations

from scipy.stats import beta


def at_most(events: int, trials: int, level: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound on a rate after `events` in `trials`.

    Holds with probability `level` for data exchangeable with the trials. 1.0 without any trial.
    """
    if not 0 <= events <= trials:
        raise ValueError(f"{events} events in {trials} trials")
    if events == trials:
        return 1.0
    return float(beta.ppf(level, events + 1, trials - events))
