"""A model of the zoo as one holds it in Python: asks, shows, cuts, saves.

model = moezoo.load("rooms/m3vit_tiny")
predictions = model(photos)             # {"depth": metres [B, H, W], "semseg": classes, ...}
path = model.task_path("depth", keep=4)
path.export("exports/depth")
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from moezoo.deploy import deliver, export, produce
from moezoo.deploy.exporter import Exporter
from moezoo.deploy.inference import Inference, Predictions, mesh_here, names_of
from moezoo.deploy.pinned import ExpertPlace
from moezoo.deploy.produce import Produced, Request, TrainedRun
from moezoo.deploy.stream import StreamedRun
from moezoo.errors import UserError, unknown
from moezoo.files import check_file
from moezoo.models.shared.config import traits
from moezoo.models.shared.macs import Macs
from moezoo.nn import module
from moezoo.tasks.base import Task
from moezoo.train import saved, zoo
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.setup import Loaded


class AskedModel:
    """What can be asked: a model with its weights, and the tasks that it answers.

    name: of the configuration, the run or the folder that it comes from.   config: that
    configuration.   about: step, origin, classes, scores and facts (`train.zoo.About`).
    """

    def __init__(self, name: str, loaded: Loaded, about: zoo.About):
        self.name, self.about, self._loaded = name, about, loaded

    @property
    def config(self) -> Config:
        """The configuration, which says everything about model, data and training."""
        return self._loaded.config

    @property
    def tasks(self) -> tuple[str, ...]:
        """What it predicts."""
        return tuple(self._asked.tasks)

    @cached_property
    def _asked(self) -> Inference:
        return self.config.data.domain.inference(self._loaded, self.about.classes)

    def __call__(self, examples: Any, tasks: Sequence[str] | None = None) -> Predictions:
        """Predictions of a batch by task (all by default), in the tasks' units.

        examples: what the domain's files hold, as NumPy: photos uint8 [B, height, width, 3] of any
        size, waveforms, prompts; or the array that `prepare` makes of them. Compiled once per task
        choice and batch size; can be called inside of `jax.jit` with such an array; sharded where
        a mesh is set with `jax.set_mesh`. Raises UserError for anything else.
        """
        if isinstance(examples, str | Path):
            raise UserError(f"{examples} is one file: put it, or several, in a list.")
        return self._asked.predict(examples, tasks)

    def prepare(self, examples: Any) -> Any:
        """The array that the network reads, resized and normalised as in training."""
        return self._asked.prepare(examples)

    def read(self, file: Any) -> Any:
        """A file (photo, recording) as an example; put several in a list to ask for all."""
        return self._asked.read(file)

    def backdrop(self, example: Any) -> np.ndarray:
        """The picture, uint8 [height, width, 3], that an example's predictions are shown on."""
        return self._asked.backdrop(example)

    def picture(self, files: Any, out: Any, tasks: Sequence[str] | None = None) -> Path:
        """Paint the predictions of a file, or of several, as `moezoo predict` does, into `out`."""
        from moezoo.front import sheet  # matplotlib costs a third of a second

        if not isinstance(files, str | Path) and not len(files):
            raise UserError("There is no file to paint: give at least one.")
        paths = [Path(one) for one in ([files] if isinstance(files, str | Path) else files)]
        if not isinstance(out, str | Path):
            raise UserError(f"The picture's file is {out!r:.60}; give a path.")
        place = os.path.realpath(out)
        if place in map(os.path.realpath, paths):
            raise UserError(f"The picture's file is {out}, which is to be painted: name another.")
        names = self.tasks if tasks is None else names_of(tasks)
        check_file(Path(out))
        sheet.draw(sheet.predicted(self, paths, names), Path(out))
        return Path(out)

    def usage(self, examples: Any) -> dict[str, dict[str, np.ndarray]]:
        """By task and MoE layer which share of the choices each expert has, float64 [E]."""
        return self._asked.usage(examples)

    def features(self, examples: Any, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """By task what its head reads: tokens [B, T, D], maps [B, h, w, D] or vectors [B, D]."""
        return self._asked.features(examples, tasks)

    def task(self, name: str) -> Task:
        """A task: its unit, its classes, how it is painted; UserError for an unknown one."""
        if name not in self._asked.tasks:
            raise unknown("task of this model", name, list(self.tasks))
        return self._asked.tasks[name]

    def labels(self, task: str) -> tuple[str, ...]:
        """The names of a task's classes; empty where it has none, or they are not known.

        Raises UserError for an unknown task.
        """
        self.task(task)
        return tuple(self._asked.labels.get(task, ()))

    @property
    def parameters(self) -> int:
        """How many parameters there are, in all tasks and all experts."""
        return module.count(module.split(self._loaded.model).params)

    @property
    def macs(self) -> Macs | None:
        """Multiply-accumulates of one example for all tasks; None where nobody has counted."""
        size = self.config.data.domain.size(self.config)
        channels = {task.name: task.channels for task in self._loaded.tasks}
        return traits(self.config.model).macs(size, channels)

    def __repr__(self) -> str:
        kind = type(self.config.model).__name__.removesuffix("Config")
        return f"<{self.name}: {kind}, {self.parameters:,} parameters, tasks {self.tasks}>"

    def _repr_html_(self) -> str:
        return _html(self.name, _facts(self))


class ZooModel(AskedModel):
    """A model whose weights are all in memory: it is asked, cut, exported and saved."""

    def task_path(
        self,
        task: str,
        keep: int | None = None,
        *,
        total: int | None = None,
        score: str = "reap",
        weights: str = "float32",
        calibration: int = 256,
    ) -> PathModel:
        """One task's part of the model: all of its experts, or `keep` of every layer.

        total: experts over all layers instead.   score: how an expert's worth is measured
        (`deploy.scores.SELECTIONS`).   weights: how they are stored, "int8" or "bfloat16" for fewer
        bytes.   calibration: training examples that decide. Fewer experts need the data that the
        model was trained on, which is generated or read first. Raises UserError for tasks and
        numbers that cannot be.
        """
        request = Request(
            keep=keep, total=total, score=score, weights=weights, calibration=calibration
        )
        produce.check_before(self.config, task, fewer=not request.whole)
        self.task(task)
        most = traits(self.config.model).experts
        if keep is not None and isinstance(most, int) and keep > most:
            raise UserError(f"keep is {keep}, but every layer has {most} experts: give fewer.")
        return PathModel(self, task, request)

    def export(self, folder: Any, task: str | None = None, *, replace: bool = False) -> list[Path]:
        """Write tasks as folders that run without moezoo: one, or all of them inside `folder`.

        A single task's lies in `folder` itself. Returns the folders. Raises UserError where one
        cannot be written.
        """
        if task is not None or len(self.tasks) == 1:
            name = self.tasks[0] if task is None else task
            return [self.task_path(name).export(folder, replace=replace)]
        folder = Path(folder)
        return [self.task_path(one).export(folder / one, replace=replace) for one in self.tasks]

    def save(self, folder: Any) -> Path:
        """Write configuration and weights (matrices as bfloat16), which `moezoo.load` reads.

        Raises UserError where the folder exists or cannot be written.
        """
        parts = module.split(self._loaded.model)
        return saved.write(Path(folder), self.config, parts.params, parts.stats, self.about)

    def __deepcopy__(self, memo: Any) -> ZooModel:
        """Another one with the same arrays, which never change."""
        return ZooModel(self.name, self._loaded, self.about)

    def __reduce__(self) -> Any:
        raise UserError("A model is not pickled: write it with model.save(folder), and load that.")


class StreamedModel(AskedModel):
    """A model whose experts stay in a file and are read one by one (`deploy.stream`).

    Two of them are in memory, however many there are; predictions are those of the whole model.
    Outside of compiled functions, on one device.
    """

    def __init__(
        self,
        name: str,
        run: StreamedRun,
        about: zoo.About,
        owned: TemporaryDirectory | None,
        place: ExpertPlace = "file",
    ):
        """owned: the folder of the file, where nobody else needs it.   place: see `Streamed`."""
        super().__init__(name, run.loaded, about)
        self._owned = owned
        self._streamed = super()._asked.streamed(run.file, place)

    @property
    def _asked(self) -> Inference:
        return self._streamed


class PathModel:
    """One task's path: a part of a model that can be asked, certified and exported by itself."""

    def __init__(self, model: ZooModel, task: str, request: Request):
        self.model, self.task_name, self.request = model, task, request

    @cached_property
    def _trained(self) -> TrainedRun:
        loaded, request = self.model._loaded, self.request
        return produce.open_model(loaded, request.calibration, self.task_name)

    @cached_property
    def _made(self) -> Produced:
        return produce.produce(self._trained, self.task_name, self.request, Console())

    @cached_property
    def path(self) -> Any:
        """The computation and its weights (`deploy.path.TaskPath`)."""
        if mesh_here() is not None:
            raise UserError("A task's path is for one device: cut it outside of jax.set_mesh.")
        if not self.request.whole or self.request.weights != "float32":
            return self._made.path
        exporter: Exporter = self.model.config.data.domain.exports(self.model.config)
        subject = exporter.subject(self.model._loaded, self.model.about.classes)
        return subject.cut(subject.model, self.task_name, exporter.input)

    @property
    def certificate(self) -> Mapping[str, Any]:
        """What was kept, what it costs, and what was lost, measured on the test data."""
        return self._made.certificate

    def __call__(self, examples: Any) -> Any:
        """The task's prediction of a batch; examples as the whole model takes them."""
        path = self.path
        if mesh_here() is not None:
            raise UserError("A task's path is for one device: ask it outside of jax.set_mesh.")
        given = self.model.prepare(examples)
        return self.model.task(self.task_name).postprocess(path(given).logits)

    def violations(self, examples: Any) -> np.ndarray:
        """Of every example the tokens that asked for an expert that is gone, int32 [B]."""
        return np.asarray(self.path(self.model.prepare(examples)).violations_B)

    def export(self, folder: Any, *, replace: bool = False, formats: Sequence[str] = ()) -> Path:
        """Write the path as a folder that runs without moezoo, with its certificate.

        formats: of `deploy.deliver.FORMATS`, such as ("onnx",) for `model.onnx` besides.
        """
        folder = Path(folder)
        export.check_free(folder, replace=replace)
        deliver.check_formats(formats, self.request)
        export.check_input(self._trained.exporter.input)
        options = {"replace": replace, "formats": formats}
        return deliver.export_path(self._trained, self._made, folder, **options)

    def _repr_html_(self) -> str:
        stated = self.certificate
        rows = {"kind": stated["kind"], "parameters": f"{stated['cost']['parameters']:,}"}
        rows |= dict(deliver.summary(self._made))
        return _html(f"{self.model.name}: {self.task_name}", rows)

    def __repr__(self) -> str:
        asked = self.request
        kept = "all experts" if asked.whole else f"{asked.keep or asked.total} experts"
        kept += "" if asked.total is None else " over all layers"
        return f"<the {self.task_name} path of {self.model.name}, {kept}>"


def _facts(model: AskedModel) -> dict[str, str]:
    rows = {
        "system": type(model.config.model).__name__.removesuffix("Config"),
        "tasks": ", ".join(model.tasks),
        "parameters": f"{model.parameters:,}",
        "trained": model.about.origin,
    }
    for task, scores in model.about.scores.items():
        rows[task] = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return rows | dict(model.about.facts)


def _html(title: str, rows: Mapping[str, Any]) -> str:
    cells = "".join(
        f"<tr><th style='text-align:left'>{escape(str(name))}</th><td>{escape(str(said))}</td></tr>"
        for name, said in rows.items()
    )
    return f"<table><caption><b>{escape(title)}</b></caption>{cells}</table>"
