"""Pictures of a run on text: which ranks each task uses in which layer, and scores by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moezoo.train.pictures import figure_of, save


def usage_grid(path: Path, layers: Mapping[str, np.ndarray], tasks: Sequence[str]) -> None:
    """Expert-by-task heatmaps, one row per layer and one column per kind of linear layer.

    `layers["layers/3/attn/q"]` holds shares [J, E] whose rows sum to 1. All panels have one scale,
    in multiples of an even share, so that white means "as if nothing decided".
    """
    split = [name.rsplit("/", 2) for name in layers]
    rows = list(dict.fromkeys(parts[0] for parts in split))
    columns = list(dict.fromkeys("/".join(parts[1:]) for parts in split))
    height = 0.6 + (0.25 + 0.13 * len(tasks)) * len(rows)
    figure, axes = figure_of(len(rows), len(columns), (1.6 + 2.0 * len(columns), height))
    drawn = None
    for axis in axes.ravel():
        axis.set_axis_off()
    for name, table_JE in layers.items():
        row, _, column = name.rpartition("/")
        row, kind = row.rpartition("/")[0], f"{row.rpartition('/')[2]}/{column}"
        axis = axes[rows.index(row), columns.index(kind)]
        axis.set_axis_on()
        relative = np.log2(np.maximum(table_JE * table_JE.shape[1], 1e-3))
        drawn = axis.imshow(relative, aspect="auto", cmap="RdBu_r", vmin=-3, vmax=3)
        axis.set_xticks([])
        axis.set_yticks([])
        if kind == columns[0]:
            axis.set_yticks(range(len(tasks)), list(tasks), fontsize=6)
            axis.set_ylabel(row, fontsize=8)
        if row == rows[0]:
            axis.set_title(kind, fontsize=9)
        if row == rows[-1]:
            axis.set_xlabel(f"{table_JE.shape[1]} experts", fontsize=7)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes, fraction=0.02, ticks=[-3, -2, -1, 0, 1, 2, 3])
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"], fontsize=7)
        bar.set_label("use, in even shares", fontsize=8)
    save(figure, path)


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
