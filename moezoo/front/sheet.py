"""Files and what a model predicts of them, as a picture with the meaning of its colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.deploy.runtime import drawing
from moezoo.tasks.base import Task
from moezoo.train import pictures


class Sheet(NamedTuple):
    """Rows of files.

    names: of the files.   below: the pictures that predictions are shown on.   painted: by task a
    picture per file, as large as that.   keys: what their colours mean, by task.   said: per file
    and task the prediction in words.   arrays: predictions [files, ...] by task.
    """

    names: list[str]
    below: list[np.ndarray]
    painted: dict[str, list[np.ndarray]]
    keys: dict[str, Any]
    said: list[dict[str, str]]
    arrays: dict[str, np.ndarray]


def predicted(model: Any, files: Sequence[Path], tasks: Sequence[str]) -> Sheet:
    """Read the files and ask the model (`front.model.ZooModel`).

    Raises UserError for a task that it has not, and for files that it does not read.
    """
    for task in tasks:
        model.task(task)
    examples = [model.read(file) for file in files]
    below = [model.backdrop(example) for example in examples]
    # One by one: photos may have different sizes, and are resized before they become a batch.
    batch = np.concatenate([np.asarray(model.prepare([example])) for example in examples])
    found = {task: np.asarray(x) for task, x in model(batch, tasks).items()}
    painted, keys = {}, {}
    said: list[dict[str, str]] = [{} for _ in files]
    for name, values in found.items():
        task = _fitted(model.task(name), values)
        how = manifest(task, model.labels(name))
        painted[name] = [
            drawing.paint(how, value, under.shape[:2], under)
            for value, under in zip(values, below, strict=True)
        ]
        keys[name] = task.picture.key(list(values))
        for row, value in zip(said, values, strict=True):
            row[name] = drawing.words(how, value)
    return Sheet([file.name for file in files], below, painted, keys, said, found)


def _fitted(task: Task, values: np.ndarray) -> Task:
    """The task with its pictures on a scale that these predictions use."""
    return replace(task, picture=task.picture.fitted(list(values)))


def manifest(task: Task, labels: Sequence[str]) -> Mapping[str, Any]:
    """What painting and words need of a task, as an export's manifest says it."""
    about = {"name": task.name, "unit": task.prediction.unit, "labels": list(labels)}
    return {"task": about, "picture": task.painting()}


def draw(sheet: Sheet, out: Path) -> None:
    """Files beside what was predicted of them, and the meaning of the colours below."""
    first = pictures.Column({"input": sheet.below}, None)
    columns = [
        pictures.Column({task: painted}, sheet.keys[task])
        for task, painted in sheet.painted.items()
    ]
    pictures.predictions(out, [first, *columns], {"input": sheet.names})


def draw_plain(sheet: Sheet, out: Path) -> None:
    """The sheet's one task of its one file, as a picture of the file's size."""
    [[picture]] = sheet.painted.values()
    drawing.write_image(out, picture)
