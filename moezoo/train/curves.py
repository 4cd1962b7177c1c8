"""The picture of a run's course: losses, gradient, learning rate and scores over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.train.pictures import figure_of, save

THIN, THICK = "#b8c4d6", "#1f4e8c"
TITLES = {
    "loss/total": "weighted sum of all losses",
    "gradient_norm": "length of the gradient",
    "learning_rate": "learning rate",
}
SHOWN = ("loss/", "balance/", "gradient_norm", "learning_rate")
UNITS = {"rmse": "m", "mean_angle": "degrees"}
DECADES = 2.0  # a curve that falls by more than so many powers of ten is drawn on a log scale


class Panel(NamedTuple):
    """One curve: its title, what stands at its vertical axis, and its points.

    measured: at every logged step of training; otherwise scores of evaluations.
    """

    title: str
    label: str
    steps: np.ndarray
    values: np.ndarray
    measured: bool


def curves(
    path: Path,
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    lower_is_better: Mapping[str, bool] | None = None,
) -> None:
    """Draw `rows` of the training, and `evaluations` of it, of metrics.jsonl.

    lower_is_better: by name of a score, "depth/rmse". A value that was no finite number has no
    point. Nothing is drawn where there are no points at all.
    """
    shown = panels(rows, evaluations, lower_is_better or {})
    if not shown:
        return
    columns = min(4, len(shown))
    height = -(-len(shown) // columns)
    figure, axes = figure_of(height, columns, (3.4 * columns, 2.5 * height + 0.3))
    for axis in axes.ravel()[len(shown) :]:
        axis.set_axis_off()
    last = max(panel.steps[-1] for panel in shown)
    for axis, panel in zip(axes.ravel(), shown, strict=False):
        _draw(axis, panel, last)
    handles = {}
    for axis in axes.ravel():
        named = [line for line in axis.get_lines() if not str(line.get_label()).startswith("_")]
        handles |= {line.get_label(): line for line in named}
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncol=3, fontsize=8
    )
    save(figure, path)


def panels(
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    lower_is_better: Mapping[str, bool],
) -> list[Panel]:
    """What there is to draw: the sum of all losses first, scores last."""
    names = sorted({key for row in rows for key in row if key.startswith(SHOWN)}, key=_place)
    found = [Panel(TITLES.get(n, n), _label(n), *_points(rows, n), True) for n in names]
    for name in sorted({key for row in evaluations for key in row if "/" in key}):
        better = "lower is better" if lower_is_better.get(name) else "higher is better"
        unit = UNITS.get(name.rpartition("/")[2])
        label = f"{unit}, {better}" if unit else better
        found.append(Panel(name, label, *_points(evaluations, name), False))
    return [panel for panel in found if len(panel.steps)]


def _place(name: str) -> tuple[int, str]:
    first = ("loss/total", "loss/", "balance/", "gradient_norm", "learning_rate")
    return next(i for i, start in enumerate(first) if name.startswith(start)), name


def _label(name: str) -> str:
    return {"loss": "loss", "balance": "balance loss", "learning_rate": "per step"}.get(
        name.partition("/")[0], "L2 norm"
    )


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [
        (row["step"], row[name])
        for row in rows
        if isinstance(row.get(name), int | float) and math.isfinite(row[name])
    ]
    return np.array([step for step, _ in found]), np.array([float(value) for _, value in found])


def smooth(values: np.ndarray) -> np.ndarray:
    """The running mean over a twenty-fifth of the points; each end is continued."""
    width = max(1, len(values) // 25)
    padded = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def limits(values: np.ndarray) -> tuple[float, float]:
    """What a vertical axis shows: all but the wildest hundredth of the values, with a margin."""
    low, high = (float(x) for x in np.quantile(values, (0.01, 0.99)))
    if values.min() >= 0 and low < 0.3 * high:
        low = 0.0  # a curve that comes near 0 is judged by its distance from it
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return (low if low == 0.0 else low - margin), high + margin


def logarithmic(values: np.ndarray) -> bool:
    """Whether a curve falls so far that its end would lie flat on the axis."""
    if values.min() <= 0:
        return False
    low, high = np.quantile(values, (0.05, 0.95))
    return math.log10(high / low) > DECADES


def _draw(axis: Any, panel: Panel, last: int) -> None:
    if panel.measured:
        exact = panel.title == TITLES["learning_rate"]  # no noise to look through
        if not exact:
            axis.plot(panel.steps, panel.values, color=THIN, linewidth=0.8, label="as logged")
        line = panel.values if exact else smooth(panel.values)
        # The legend needs no name for a line that is alone in its panel.
        label = "_exact value" if exact else "running mean"
        marker = "o" if len(line) < 3 else ""  # a line through one point cannot be seen
        axis.plot(panel.steps, line, marker=marker, color=THICK, linewidth=1.6, label=label)
    else:
        score = {"color": THICK, "linewidth": 1.6, "marker": "o", "markersize": 3}
        axis.plot(panel.steps, panel.values, label="evaluation", **score)
    if panel.measured and logarithmic(panel.values):
        axis.set_yscale("log")
    else:
        axis.set_ylim(*limits(panel.values))
    axis.set_xlim(0, max(last, 1))
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(panel.label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
