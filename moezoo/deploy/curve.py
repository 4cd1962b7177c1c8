"""The picture of a trade-off curve: what is lost, by experts per layer, for every method."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.deploy.sweep import Curve, Method, Point, differing
from moezoo.train.pictures import figure_of, save

# As many as a sweep has methods, with recovery (`sweep.methods`); page.html has the same.
COLOURS = ("#1f4e8c", "#2a9d8f", "#8a5fbf", "#e07b39", "#8d99a6", "#c9b458", "#b23a48")
COLOURS += ("#5fa8d3", "#6b4226", "#d4a5c9")


def picture(file: Path, curves: Sequence[Curve]) -> None:
    """One row per task: relative loss of the metric, disagreement, loss by bytes, time of a call.

    Bars are 95 % intervals by paired bootstrap over the test examples; of times the median is
    shown, by ways of answering for removed experts.
    """
    drawn, axes = figure_of(len(curves), 4, (17.5, 3.4 * len(curves) + 0.8))
    for row, curve in zip(axes, curves, strict=True):
        for colour, (method, points) in zip(cycle(COLOURS), curve.points.items(), strict=False):
            if points:
                _losses(row[0], curve, method, points, colour)
                _disagreements(row[1], points, colour)
                _sizes(row[2], curve, points, colour)
                _times(row[3], points, colour)
        _label(row, curve)
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save(drawn, file)


def losses(curve: Curve, points: Sequence[Point]) -> np.ndarray:
    """The relative loss on the test examples in percent, NaN where it is not known."""
    values = [point.test["relative_loss"]["value"] for point in points]
    return np.array([np.nan if v is None else 100 * v for v in values])


def _losses(axis: Any, curve: Curve, method: Method, points: Sequence[Point], colour: str) -> None:
    keep, value = np.array([point.keep for point in points]), losses(curve, points)
    sign = 1.0 if curve.lower_is_better else -1.0
    ends = np.full((2, len(points)), np.nan)
    for i, point in enumerate(points):
        interval = point.test["change_95"]
        if interval is not None and curve.full:
            ends[:, i] = sorted(100 * sign * c / abs(curve.full) for c in interval)
    bars = np.abs(ends - value)
    axis.errorbar(
        keep, value, bars, color=colour, marker="o", ms=3.5, lw=1.4, elinewidth=0.8, capsize=2,
        label=method.label,
    )  # fmt: skip


def _disagreements(axis: Any, points: Sequence[Point], colour: str) -> None:
    shown = [differing(point.test) for point in points]
    keep = [point.keep for point in points]
    axis.plot(keep, [100 * d["rate"] for d in shown], color=colour, marker="o", ms=3.5, lw=1.4)


def _sizes(axis: Any, curve: Curve, points: Sequence[Point], colour: str) -> None:
    sizes = [point.cost["bytes"] / 1e6 for point in points]
    axis.plot(sizes, losses(curve, points), color=colour, marker="o", ms=3.5, lw=1.4)


def _times(axis: Any, points: Sequence[Point], colour: str) -> None:
    times = [point.latency["median_ms"] for point in points]
    axis.plot([p.keep for p in points], times, color=colour, marker="o", ms=3.5, lw=1.4)


def _label(row: Sequence[Any], curve: Curve) -> None:
    better = "lower" if curve.lower_is_better else "higher"
    row[0].set_title(
        f"{curve.task}: {curve.metric} {curve.full:.4g} with all experts ({better} is better)",
        fontsize=9,
    )
    row[0].set_ylabel(f"loss of {curve.metric}, %")
    row[1].set_title(_wrapped(curve.differs), fontsize=7)
    row[1].set_ylabel(f"{curve.unit} that differ, %")
    row[2].set_ylabel(f"loss of {curve.metric}, %")
    row[2].set_xlabel("weights, MB")
    examples = next(points[0].latency["batch"] for points in curve.points.values() if points)
    row[3].set_ylabel(f"median of a call, ms for {examples}")
    row[3].set_ylim(bottom=0)
    for axis in (row[0], row[1], row[3]):
        axis.set_xlabel("experts per layer")
        axis.invert_xaxis()
        axis.xaxis.get_major_locator().set_params(integer=True)
    row[2].invert_xaxis()
    for axis in (row[0], row[2]):
        axis.axhline(0, color="#444444", lw=0.8)


def _wrapped(text: str, width: int = 60) -> str:
    return "\n".join(textwrap.wrap(text, width))
