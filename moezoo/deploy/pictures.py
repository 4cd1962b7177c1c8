"""Pictures of a pruned path: what its experts did, and what it predicts beside the whole path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.deploy import scores
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.path import TaskPath
from moezoo.deploy.splits import Subset
from moezoo.tasks.base import Task
from moezoo.train.pictures import Column, figure_of, predictions_of, save
from moezoo.train.pictures import predictions as draw_columns

KEPT, REMOVED = "#1f4e8c", "#c9ced6"
CHOSEN_BY = {  # what the bars of a plan's score are; errors: squared, of replacing the expert
    "frequency": "choices, %",
    "gate_sum": "weight, %",
    "reap": "weight x norm, %",
    "reap_mean": "mean weight x norm, %",
    "mone": "deviation x weight, %",
    "importance": "first choices, %",
    "residual": "layer error, %",
    "gram": "layer error alone, %",
    "random": "random rank, %",
}


def usage(file: Path, found: Calibration, path: TaskPath) -> None:
    """Per MoE layer each expert's share of the choices, and beside it of the score that chose.

    Kept experts are dark, removed ones light; numbers stand on the bars.
    """
    names, score = list(path.layers), path.plan.score
    widest = max(layer.experts for layer in path.layers.values())
    columns = 1 if score == "frequency" else 2
    size = (columns * min(14.0, 2.0 + 0.4 * widest), 0.6 + 1.7 * len(names))
    drawn, axes = figure_of(len(names), columns, size)
    for row, name in zip(axes, names, strict=True):
        layer = path.layers[name]
        shown = {CHOSEN_BY["frequency"]: np.asarray(found.layers[name].count_E)}
        if columns == 2:
            # "gram" judges sets of experts; what it says of each one alone is its "residual".
            by = scores.by_name("residual" if score == "gram" else score)
            shown[CHOSEN_BY[score]] = by(found.layers[name])
        for axis, (label, value_E) in zip(row, shown.items(), strict=True):
            _bars(axis, 100 * value_E / max(float(value_E.sum()), 1e-30), layer.kept)
            axis.set_ylabel(label, fontsize=8)
        row[0].set_title(
            f"{name}: {len(layer.kept)} of {layer.experts} experts kept for {path.task}", fontsize=9
        )
        if columns == 2:
            row[1].set_title(f"the score that chose: {score}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("expert (bold: kept)")
    save(drawn, file)


def _bars(axis: Any, percent_E: np.ndarray, kept: Sequence[int]) -> None:
    colours = [KEPT if e in kept else REMOVED for e in range(len(percent_E))]
    bars = axis.bar(range(len(percent_E)), percent_E, color=colours)
    axis.bar_label(bars, fmt="%.0f", fontsize=6)
    axis.margins(y=0.15)
    axis.set_xticks(range(len(percent_E)))
    axis.tick_params(labelsize=7)
    for expert, tick in enumerate(axis.get_xticklabels()):  # a kept one may have no bar at all
        tick.set(
            fontweight="bold" if expert in kept else "normal", alpha=1 if expert in kept else 0.6
        )


def predictions(
    file: Path,
    whole: TaskPath,
    cut: TaskPath,
    task: Task,
    part: Subset,
    shown: Callable[[np.ndarray], np.ndarray],
    count: int = 4,
) -> None:
    """One row per example: input, truth, the whole path's and the pruned path's prediction.

    shown: one example of the paths' input as a picture, uint8 [height, width, 3].
    """
    count = min(count, len(part.source))
    batch = next(part.batches(count, task.name))
    given = batch[whole.input.name]
    before, _ = _run(whole, task, given)
    after, violations_B = _run(cut, task, given)
    images = [shown(example) for example in given]
    column = predictions_of(
        task, batch[task.name][:count], {"all experts": list(before), "pruned": list(after)}
    )
    notes = {"pruned": [f"{n} tokens lost an expert" for n in violations_B]}
    draw_columns(file, [Column({"input": images}, None), column], notes)


def _run(path: TaskPath, task: Task, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Post-processed predictions and violations, two rows at a time as the golden outputs are."""
    parts = [path(given[i : i + 2]) for i in range(0, len(given), 2)]
    predictions = [np.asarray(task.postprocess(part.logits)) for part in parts]
    return np.concatenate(predictions), np.concatenate([part.violations_B for part in parts])
