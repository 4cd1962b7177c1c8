"""Pictures of a run on text: scores by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moezoo.train.pictures import figure_of, save


def scores_by_task(path: Path, scores: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Bars of exact match and token accuracy of each task; NaN where there was no example."""
    names = ("exact_match", "accuracy")
    figure, axes = figure_of(1, 1, (4.6, 0.9 + 0.28 * len(tasks)))
    axis, places = axes[0, 0], np.arange(len(tasks))
    for k, (name, colour) in enumerate(zip(names, ("#1f4e8c", "#b8c4d6"), strict=True)):
        values = [scores.get(f"{task}/{name}", float("nan")) for task in tasks]
        axis.barh(places + 0.4 * k, values, height=0.38, color=colour, label=name)
    axis.set_yticks(places + 0.2, list(tasks), fontsize=8)
    axis.set_xlim(0, 1)
    axis.grid(axis="x", alpha=0.25)
    axis.set_ylim(len(tasks) - 0.4, -0.4)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)
    save(figure, path)
