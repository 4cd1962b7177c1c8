"""What a finished run leaves for people: report.md, a page of it, pictures that its domain draws.

Names of people's own are escaped: no sign of theirs is taken for Markdown.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo.files import check_writable, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.tasks.base import Task
from moezoo.train import constant, curves, log, report_page, run_folder, step
from moezoo.train.console import Console
from moezoo.train.evaluate import Evaluation
from moezoo.train.loop import Finished
from moezoo.train.setup import amounts

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


# Beside what a domain draws.
SHOWN = {
    "usage.png": "expert usage by task",
    "curves.png": "the course of the training: losses, gradient, learning rate, scores",
}


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
    shown: Mapping[str, str],
) -> None:
    """Write report.md: facts of the run, the score table, every other score, the pictures.

    shown: the files in `pictures`, and what each shows.
    """
    lines = [f"# {escaped(title)}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "## Scores on the test split", "", table, "", "### All scores", ""]
    for task in tasks:
        known = {k: v for k, v in evaluation.scores[task.name].items() if v == v}  # no NaN
        scores = ", ".join(f"{escaped(k)} {v:.4f}" for k, v in known.items())
        lines.append(f"- {escaped(task.name)}: {scores}")
    lines += ["", "## Pictures", ""]
    for name, words in shown.items():
        mark = "!" if name.endswith(".png") else ""
        lines += [f"{mark}[{words}](pictures/{name})", ""]
    write_atomically(path, "\n".join(lines))


def facts(finished: Finished) -> dict[str, str]:
    """What a reader needs to judge or repeat the run."""
    setup, config = finished.setup, finished.setup.config
    devices = jax.devices()
    changes = [
        f"{c.option} {c.before} to {c.after} after step {c.step}"
        for c in run_folder.changes(finished.directory)
    ]
    changed = {"changed on the way": "; ".join(changes)} if changes else {}
    return {
        "configuration": "`config.json` beside this file",
        **changed,
        "steps": f"{config.train.steps} of {config.train.batch} {setup.domain.unit}, "
        f"seed {config.seed}",
        "data": f"{config.data.name}, {amounts(setup)} {setup.domain.describe(config)}",
        "what is minimised": weighted_sum(finished),
        "parameters": f"{module.count(finished.state['params']):,} in training",
        "wall time": f"{finished.spent}, of which {100 * finished.spent.goodput:.0f} % moved the "
        "model",
        "devices": f"{len(devices)} {devices[0].device_kind} ({platform.machine()})",
        "versions": f"jax {jax.__version__}, Python {platform.python_version()}",
    }


def weighted_sum(finished: Finished) -> str:
    """What `loss/total` is, in words."""
    setup, train = finished.setup, finished.setup.config.train
    parts = [f"{task.weight:g} x {task.name}" for task in setup.tasks]
    parts += [
        f"{weight:g} x balance loss {name}"
        for name in step.BALANCE
        if (weight := getattr(train, f"{name}_weight"))
    ]
    learned = ", each task's times 0.5 / sigma^2" if train.task_weighting == "learned" else ""
    return (
        f"`loss/total` of `metrics.jsonl`, the weighted sum of the losses (of those that the model "
        f"has): {escaped(' + '.join(parts))}{learned}"
    )


def best_constants(finished: Finished) -> dict[str, dict[str, float]]:
    """Scores of the best constant predictor, for tasks that have one."""
    setup = finished.setup

    def batches(source: Any, size: int, names: Sequence[str]) -> Iterable[Mapping[str, Any]]:
        return setup.domain.evaluation(source, len(source), size, names, range(size))

    return constant.scores(setup.tasks, setup.train, setup.test, batches)


def write_report(finished: Finished, console: Console | None = None) -> None:
    """Write `report.md`, the same as one page, and `pictures/` (process 0), and name them."""
    console = console or Console()
    setup, evaluation = finished.setup, finished.evaluation
    folder = finished.directory / "pictures"
    if jax.process_index() == 0:
        check_writable(folder)
    # Of a small test set each example once.
    count = min(setup.config.evaluate.pictures, len(setup.test))
    setup.domain.draw(finished, folder, count)
    if jax.process_index() == 0:
        rows = log.read(finished.directory / log.NAME)
        between = "test" if setup.valid is None else "valid"
        names = ("step", *evaluation.headline(setup.tasks))
        curves.curves(
            folder / "curves.png",
            [row for row in rows if row.get("split") == "train"],
            [
                {name: row.get(name) for name in names}
                for row in rows
                if row.get("split") == between and setup.config.evaluate.every
            ],
            {f"{t.name}/{t.headline}": t.lower_is_better for t in setup.tasks},
        )
        table = score_table(setup.tasks, evaluation, best_constants(finished))
        found = {path.name for path in folder.iterdir()}
        words = {**setup.domain.pictures, **SHOWN}
        write(
            finished.directory / "report.md",
            setup.config.name,
            facts(finished),
            table,
            evaluation,
            setup.tasks,
            {name: what for name, what in words.items() if name in found},
        )
        table_of_usage = {layer: usage.tolist() for layer, usage in evaluation.usage.items()}
        write_atomically(folder / "usage.json", json_text(table_of_usage))
        _write_page(finished.directory)
    console.say(
        f"Report: {finished.directory / 'report.md'}, as one page index.html, pictures in {folder}."
    )


def _write_page(folder: Path) -> None:
    """`index.html`, the page of a run's report.md."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    page = report_page.page_of(text, lambda name: (folder / name).read_bytes())
    write_atomically(folder / "index.html", page)
