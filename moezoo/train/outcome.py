"""The last act of a run: pictures, report.md, and where to find them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from moezoo.data import pipeline
from moezoo.data.source import First
from moezoo.domains.audio import report as audio_outcome
from moezoo.domains.audio.domain import Audio
from moezoo.domains.images.training import Images, Text
from moezoo.domains.pairs import report as pairs_outcome
from moezoo.domains.pairs.domain import Pairs
from moezoo.domains.text import report as text_outcome
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.train import constant, curves, log, report, run_folder, step
from moezoo.train import mesh as meshes
from moezoo.train.console import Console
from moezoo.train.evaluate import to_host
from moezoo.train.files import write_atomically
from moezoo.train.loop import Finished, rows_of
from moezoo.train.report import escaped


def example_predictions(finished: Finished, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits of the first test examples and the batch they belong to; all processes take part."""
    setup = finished.setup
    shards = meshes.batch_shards(setup.mesh)
    size = -(-count // shards) * shards
    rows = rows_of(setup.mesh, size)
    batch = next(pipeline.evaluation(First(setup.test, size), size, setup.names, rows))
    placed = meshes.place(setup.mesh, batch, size)

    def forward(params: Any, stats: Any, image: jax.Array) -> dict[str, jax.Array]:
        return module.merge(finished.definition, params, stats)(image).predictions

    with jax.set_mesh(setup.mesh):
        logits = jax.jit(forward)(
            finished.state["params"], finished.state["stats"], placed["image"]
        )
    return to_host((logits, placed))


def draw(finished: Finished, folder: Path, count: int) -> None:
    """Pictures of a run on images; all processes take part."""
    logits, batch = example_predictions(finished, max(count, 1))
    if jax.process_index() == 0:
        report.draw(folder, finished.setup.tasks, logits, batch, finished.evaluation, count)


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
        "steps": f"{config.train.steps} of {config.train.batch} examples, seed {config.seed}",
        "data": f"{config.data.name}, {len(setup.train)} training and {len(setup.test)} "
        f"test examples {setup.domain.describe(config)}",
        "what is minimised": weighted_sum(finished),
        "parameters": f"{module.count(finished.state['params']):,} in training",
        "wall time of this part of the run": f"{finished.seconds:.0f} s",
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

    return constant.scores(setup.tasks, setup.train, setup.test, batches=batches)


DRAW: dict[type, Callable[[Finished, Path, int], None]] = {
    Images: draw,
    Text: text_outcome.draw,
    Audio: audio_outcome.draw,
    Pairs: pairs_outcome.draw,
}


def write_outcome(finished: Finished, console: Console | None = None) -> None:
    """Write `report.md` and `pictures/` into the run's folder (process 0) and name them."""
    console = console or Console()
    setup, evaluation = finished.setup, finished.evaluation
    folder = finished.directory / "pictures"
    DRAW[type(setup.domain)](finished, folder, setup.config.evaluate.pictures)
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
        labelled = isinstance(setup.domain, Images | Audio)
        constants = best_constants(finished) if labelled else {}
        table = report.score_table(setup.tasks, evaluation, constants)
        report.write(
            finished.directory / "report.md",
            setup.config.name,
            facts(finished),
            table,
            evaluation,
            setup.tasks,
            sorted(path.name for path in folder.iterdir()),
        )
        table_of_usage = {layer: usage.tolist() for layer, usage in evaluation.usage.items()}
        write_atomically(folder / "usage.json", json_text(table_of_usage))
    console.say(f"Report: {finished.directory / 'report.md'}, pictures in {folder}.")
