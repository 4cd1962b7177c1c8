"""Pictures of a pruned path: what its experts did, and what it predicts beside the whole path."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moezoo.data import transforms
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.path import TaskPath
from moezoo.deploy.splits import Part
from moezoo.tasks.base import Task
from moezoo.train.files import write_atomically

KEPT, REMOVED = "#1f4e8c", "#c9ced6"


def usage(file: Path, found: Calibration, path: TaskPath) -> None:
    """Each expert's share of the task's choices per MoE layer; kept experts are dark."""
    names = list(path.layers)
    widest = max(layer.experts for layer in path.layers.values())
    size = (min(14.0, 2.0 + 0.4 * widest), 0.6 + 1.5 * len(names))
    drawn, axes = _figure(len(names), 1, size)
    for axis, name in zip(axes[:, 0], names, strict=True):
        layer, count_E = path.layers[name], found.layers[name].count_E
        share_E = count_E / max(float(count_E.sum()), 1.0)
        colours = [KEPT if e in layer.kept else REMOVED for e in range(layer.experts)]
        axis.bar(range(layer.experts), 100 * share_E, color=colours)
        axis.set_xticks(range(layer.experts))
        axis.tick_params(labelsize=7)
        axis.set_ylabel("% of choices", fontsize=8)
        axis.set_title(
            f"{name}: {len(layer.kept)} of {layer.experts} experts kept for {path.task}", fontsize=9
        )
    axes[-1, 0].set_xlabel("expert")
    _save(drawn, file)


def predictions(
    file: Path, whole: TaskPath, cut: TaskPath, task: Task, part: Part, count: int = 4
) -> None:
    """One row per image: input, truth, the whole path's and the pruned path's prediction."""
    count = min(count, len(part.source))
    batch = next(part.batches(count, task.name))
    image_BHWC = batch["image"]
    before, _ = _run(whole, task, image_BHWC)
    after, violations_B = _run(cut, task, image_BHWC)
    drawn, axes = _figure(count, 4, (7.2, 1.75 * count + 0.3))
    for i, image_HWC in enumerate(image_BHWC):
        panels = {
            "input": transforms.denormalise(image_HWC),
            "truth": task.picture(batch[task.name][i]),
            "all experts": task.picture(before[i]),
            f"pruned\n{violations_B[i]} violations": task.picture(after[i]),
        }
        for axis, (title, picture) in zip(axes[i], panels.items(), strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if i == 0 or "violations" in title:
                axis.set_title(title, fontsize=8)
    _save(drawn, file)


def _run(path: TaskPath, task: Task, image_BHWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Post-processed predictions and violations, two images at a time as the golden outputs are."""
    parts = [path(image_BHWC[i : i + 2]) for i in range(0, len(image_BHWC), 2)]
    predictions = [np.asarray(task.postprocess(part.logits_BHWC)) for part in parts]
    return np.concatenate(predictions), np.concatenate([part.violations_B for part in parts])


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Figure, file: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(file, buffer.getvalue())
