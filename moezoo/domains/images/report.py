"""Reports on a run on images: predictions beside truth, usage of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo.data.source import First
from moezoo.domains.images.data.batches import evaluation as batches_of
from moezoo.domains.images.data.transforms import MEAN, STD
from moezoo.nn import module
from moezoo.tasks.base import Task
from moezoo.train import mesh as meshes
from moezoo.train import pictures, report
from moezoo.train.evaluate import Evaluation, to_host
from moezoo.train.loop import Finished


def shown_image(image_HWC: np.ndarray) -> np.ndarray:
    """The uint8 picture behind a normalised float32 image [H,W,3]."""
    return np.clip(255.0 * (image_HWC * STD + MEAN), 0, 255).astype(np.uint8)


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


def _draw(
    directory: Path,
    tasks: Sequence[Task],
    logits: Mapping[str, np.ndarray],
    batch: Mapping[str, np.ndarray],
    evaluation: Evaluation,
    count: int,
) -> None:
    """Write `predictions.png` and, for models with experts, `usage.png`; for one process only."""
    count = min(count, len(batch["image"]))
    if count:
        images = [shown_image(image) for image in batch["image"][:count]]
        columns = panels(tasks, logits, batch, count)
        columns = [pictures.Column({"input": images}, None), *columns]
        pictures.predictions(directory / "predictions.png", columns)
    pictures.usage(
        directory / "usage.png", report.shares(evaluation), [task.name for task in tasks]
    )


def example_predictions(finished: Finished, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Logits of the first test examples and the batch they belong to; all processes take part."""
    setup = finished.setup
    shards = meshes.batch_shards(setup.mesh)
    size = -(-count // shards) * shards
    rows = meshes.rows(setup.mesh, size)
    batch = next(batches_of(First(setup.test, size), size, setup.names, rows))
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
        _draw(folder, finished.setup.tasks, logits, batch, finished.evaluation, count)
