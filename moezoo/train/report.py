"""Names of people's own in Markdown: no sign of theirs is taken for markup.

What a finished run leaves for people: report.md and pictures.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.tasks.base import Task
from moezoo.train import pictures
from moezoo.train.evaluate import Evaluation
from moezoo.train.files import write_atomically

MARKS = re.compile(r"[\\`*\[\]<>|~$&]|^[#+-](?=\s)|(?<!\w)_|_(?!\w)")


def escaped(text: object) -> str:
    """A text on one line that Markdown shows as it is, in a table's cell as well."""
    return MARKS.sub(lambda found: "\\" + found.group(), " ".join(str(text).split()))


def code(text: str) -> str:
    """A text as code, in a table's cell as well; ends of lines are shown as " / "."""
    lines = " / ".join(text.strip().splitlines())
    return "`" + lines.replace("|", "\\|").replace("`", "'") + "`"


def row(cells: Sequence[object]) -> str:
    """A line of a table; the cells' texts are escaped."""
    return f"| {' | '.join(escaped(cell) for cell in cells)} |"


SHOWN = {
    "predictions.png": "predictions beside truth",
    "samples.md": "answers beside truth",
    "captions.png": "captions beside truth",
    "retrieval.png": "the images most similar to a caption; green: it is theirs",
    "counts.png": "the images most similar to a list of things; green: they have them",
    "scores.png": "scores by task",
    "confusion.png": "which class was taken for which",
    "usage.png": "expert usage by task",
    "slots.png": "where slots look in the first clip, and where their outputs go",
    "curves.png": "the course of the training: losses, gradient, learning rate, scores",
}
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)


def shown_image(image_HWC: np.ndarray) -> np.ndarray:
    """The uint8 picture behind a normalised float32 image [H,W,3]."""
    return np.clip(255.0 * (image_HWC * IMAGENET_STD + IMAGENET_MEAN), 0, 255).astype(np.uint8)


def panels(
    tasks: Sequence[Task], logits: Mapping[str, Any], batch: Mapping[str, np.ndarray], count: int
) -> list[pictures.Column]:
    """Truth and prediction of the first `count` rows, per task, on the truths' scale."""
    drawn = []
    for task in tasks:
        predicted = np.asarray(task.postprocess(logits[task.name][:count]))
        truths = np.asarray(batch[task.name][:count])
        drawn.append(pictures.predictions_of(task, list(truths), {"prediction": list(predicted)}))
    return drawn


def draw(
    directory: Path,
    tasks: Sequence[Task],
    logits: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    evaluation: Evaluation,
    count: int,
) -> None:
    """Write `predictions.png` and, for models with experts, `usage.png`; one process's work."""
    count = min(count, len(batch["image"]))
    if count:
        images = [shown_image(image) for image in batch["image"][:count]]
        columns = panels(tasks, logits, batch, count)
        columns = [pictures.Column({"input": images}, None), *columns]
        pictures.predictions(directory / "predictions.png", columns)
    pictures.usage(directory / "usage.png", shares(evaluation), [task.name for task in tasks])


def shares(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """By layer, which share of each task's choices fell on each expert, [J, E]."""
    return {
        layer: counts_JE / np.maximum(counts_JE.sum(1, keepdims=True), 1)
        for layer, counts_JE in evaluation.usage.items()
    }


def score_table(
    tasks: Sequence[Task], evaluation: Evaluation, constants: Mapping[str, Mapping[str, float]]
) -> str:
    """A Markdown table: headline score per task beside the best constant predictor's."""
    lines = [row(("task", "score", "this model", "best constant", "gain")), "|---|---|---|---|---|"]
    for task in tasks:
        arrow = "↓" if task.lower_is_better else "↑"
        value = evaluation.scores[task.name][task.headline]
        cells = (task.name, f"{task.headline} {arrow}", _shown(value))
        if task.name in constants:
            base = constants[task.name][task.headline]
            # A share of a constant's mIoU near 0 would say nothing.
            gain = (
                f"{100 * (base - value) / base:+.1f} %"
                if task.lower_is_better and base
                else f"{value - base:+.4f}"
            )
            lines.append(row((*cells, _shown(base), gain if math.isfinite(value - base) else "–")))
        else:
            lines.append(row((*cells, "–", "–")))
    return "\n".join(lines)


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "no number"


def write(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    table: str,
    evaluation: Evaluation,
    tasks: Sequence[Task],
    found: Sequence[str],
) -> None:
    """Write report.md: facts of the run, the score table, every other score, the pictures.

    found: the names of what is in `pictures`.
    """
    lines = [f"# {escaped(title)}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Scores on the test split", "", table, "", "### All scores", ""]
    for task in tasks:
        known = {k: v for k, v in evaluation.scores[task.name].items() if v == v}  # no NaN
        scores = ", ".join(f"{escaped(k)} {v:.4f}" for k, v in known.items())
        lines.append(f"- {escaped(task.name)}: {scores}")
    lines += ["", "## Pictures", ""]
    for name, words in SHOWN.items():
        if name in found:
            mark = "!" if name.endswith(".png") else ""
            lines += [f"{mark}[{words}](pictures/{name})", ""]
    write_atomically(path, "\n".join(lines))
