"""A trained model as users ask it: examples in, predictions in their units out.

How a domain's models are asked is what `config.data.domain.inference(loaded, classes)` gives.
`ArrayInference` is that of every domain whose models read one array, which are those that can be
exported (`deploy.exporter`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from moezoo import registry
from moezoo.deploy import stream
from moezoo.deploy.exporter import Exporter, Subject
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.pinned import ExpertPlace
from moezoo.deploy.runtime.forms import ExportError
from moezoo.errors import UserError, unknown
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.schema_check import parse
from moezoo.tasks.base import Task
from moezoo.train import mesh as meshes
from moezoo.train import placement
from moezoo.train.domain import Classes
from moezoo.train.evaluate import usage_by_task
from moezoo.train.setup import Loaded
from moezoo.weights.rows import RowFile

Predictions = dict[str, Any]


class Inference(Protocol):
    """A model that can be asked.

    tasks: by name, in the model's order.   labels: names of classes by task.
    """

    @property
    def tasks(self) -> Mapping[str, Task]: ...
    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]: ...

    def read(self, path: Any) -> Any:
        """A file as an example; UserError where it is none."""
        ...

    def backdrop(self, example: Any) -> np.ndarray:
        """The picture, uint8 [height, width, 3], that an example's predictions are shown on."""
        ...

    def prepare(self, given: Any) -> Any:
        """Examples as the model reads them."""
        ...

    def predict(self, given: Any, tasks: Sequence[str] | None = None) -> Predictions:
        """Predictions of examples by task (all by default), in the tasks' units."""
        ...

    def usage(self, given: Any) -> dict[str, dict[str, np.ndarray]]:
        """By task and MoE layer the share of the choices that each expert has, float [E]."""
        ...

    def features(self, given: Any, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """By task what its head reads."""
        ...

    def streamed(self, file: RowFile, place: ExpertPlace = "file") -> Inference:
        """The same with experts from this file one by one; `stream.emptied` made its model."""
        ...


def names_of(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, of which one may be given as it is."""
    return (tasks,) if isinstance(tasks, str) else tuple(tasks)


class ArrayInference:
    """A model of one array, asked through what its domain says for exports."""

    def __init__(self, exporter: Exporter, loaded: Loaded, classes: Classes):
        self.exporter, self.loaded, self.classes = exporter, loaded, classes
        self.subject: Subject = exporter.subject(loaded, classes)
        self.input: InputSpec = exporter.input
        self.parts = module.split(self.subject.model)
        self._reader = registry.reader(self.input.name)
        self._steps = parse(json_text(self.input.preprocess, None))
        self._placed: tuple[Any, Any] | None = None
        self._meshes = True  # can be split over several devices
        self._run: Callable[..., Any] = jax.jit(self._forward, static_argnames="tasks")
        self._features: Callable[..., Any] = jax.jit(self._heads, static_argnames="tasks")

    @property
    def tasks(self) -> Mapping[str, Task]:
        return self.subject.tasks

    @property
    def labels(self) -> Mapping[str, tuple[str, ...]]:
        return {task: tuple(names) for task, names in self.classes.names.items()}

    def read(self, path: Any) -> Any:
        """A file as an example that `predict` takes in a list; UserError where it is none."""
        try:
            return self._reader.read(path, self._steps)
        except ExportError as error:
            raise UserError(str(error)) from error

    def backdrop(self, example: Any) -> np.ndarray:
        """The picture, uint8 [height, width, 3], that an example's predictions are shown on."""
        return self._reader.backdrop(example, self.prepare([example])[0])

    def prepare(self, given: Any) -> Any:
        """Examples as the model reads them, float32 [B, *shape].

        What its files hold (photos uint8 [B, height, width, 3] of any size, waveforms), a list of
        such examples or of files, or such an array already; inside of `jax.jit` only that. Raises
        UserError for any other form.
        """
        if isinstance(given, Tracer | jax.Array):
            wanted = self.input.batch(1)
            fits = given.dtype == wanted.dtype and given.shape[1:] == wanted.shape[1:]
            fits = fits and 0 not in given.shape
            if fits:
                return given
            if isinstance(given, Tracer):
                raise UserError(
                    f"Inside of a compiled function the model reads {wanted.dtype} "
                    f"[B, {', '.join(map(str, wanted.shape[1:]))}], not {given.dtype} "
                    f"{list(given.shape)}: give what model.prepare(...) returns."
                )
            given = np.asarray(given)
        examples = given if isinstance(given, list | tuple) and len(given) else None
        try:
            if examples is None:
                return _finite(self._reader.prepare(given, *self._form))
            # One by one, because they may have different sizes.
            parts = [self._reader.prepare([self._example(x)], *self._form) for x in examples]
            return _finite(np.concatenate(parts))
        except ExportError as error:
            raise UserError(str(error)) from error

    @property
    def _form(self) -> tuple[Any, Any]:
        return self.input.shape, self._steps

    def _example(self, given: Any) -> Any:
        return self.read(given) if isinstance(given, str | Path) else given

    def predict(self, given: Any, tasks: Sequence[str] | None = None) -> Predictions:
        """Predictions by task, in the tasks' units; sharded where a mesh is set (`jax.set_mesh`).

        given: see `prepare`. Raises UserError for a task that the model has not.
        """
        found, count = self._asked(self._run, given, tasks)
        return _first(found[0], count)

    def usage(self, given: Any) -> dict[str, dict[str, np.ndarray]]:
        """By task and MoE layer the share of the choices that each expert has, float64 [E]."""
        counts = self._asked(self._run, given, None)[0][1]
        groups = self.classes.groups or tuple(self.tasks)
        found: dict[str, dict[str, np.ndarray]] = {}
        for layer, count_JE in module.in_order(counts).items():
            for group, count_E in zip(groups, np.asarray(count_JE, np.float64), strict=True):
                share_E = count_E / max(count_E.sum(), 1e-30)
                found.setdefault(group, {})[layer] = share_E
        return found

    def features(self, given: Any, tasks: Sequence[str] | None = None) -> dict[str, Any]:
        """By task what its head reads: tokens [B, T, D], maps [B, h, w, D] or vectors [B, D]."""
        return _first(*self._asked(self._features, given, tasks))

    def streamed(self, file: RowFile, place: ExpertPlace = "file") -> ArrayInference:
        """The same with experts from this file one by one; `stream.emptied` made its model."""
        made = copy(self)
        made.parts = module.split(stream.with_calls(self.subject.model))
        made._run = stream.Streamed(made._forward, file, place)
        made._features = stream.Streamed(made._heads, file, place)
        made._meshes = False
        return made

    def _asked(
        self, run: Callable[..., Any], given: Any, tasks: Sequence[str] | None
    ) -> tuple[Any, int]:
        """What `run` gives, and how many of its rows were asked for."""
        names = tuple(self.tasks) if tasks is None else names_of(tasks)
        for name in names:
            if name not in self.tasks:
                raise unknown("task of this model", name, list(self.tasks))
        if not names:
            raise UserError("No task was asked for.")
        batch = self.prepare(given)
        count, mesh = batch.shape[0], mesh_here()
        if mesh is None:
            batch = batch if isinstance(batch, Tracer) else jax.device_put(batch, self._place)
            return run(self.parts.params, self.parts.stats, batch, tasks=names), count
        if not self._meshes:
            raise UserError("A streamed model is for one device: ask it outside of jax.set_mesh.")
        if mesh.axis_names != meshes.AXES or set(mesh.axis_types) != {AxisType.Auto}:
            raise UserError(
                f"The mesh that is set has the axes {', '.join(mesh.axis_names)}; models need "
                f"{', '.join(meshes.AXES)}, all of them Auto: make one with "
                "moezoo.train.mesh.make_mesh(MeshConfig(...))."
            )
        # The last row again, as often as the mesh needs it.
        more = -count % meshes.batch_shards(mesh)
        full = jnp.concatenate([batch, jnp.repeat(batch[-1:], more, axis=0)]) if more else batch
        placed = jax.device_put(full, meshes.batch_sharding(mesh))
        params, stats = self._on(mesh)
        valid_B = jnp.arange(count + more) < count
        return run(params, stats, placed, valid_B, tasks=names), count

    @property
    def _place(self) -> Any:
        """Where the parameters lie while no mesh is set."""
        return jax.tree.leaves(self.parts.params)[0].sharding

    def _on(self, mesh: Any) -> tuple[Any, Any]:
        """Parameters and statistics where training would have them on this mesh."""
        if self._placed is None or self._placed[0] != mesh:
            tree = {"params": self.parts.params, "stats": self.parts.stats}
            placed = jax.device_put(tree, placement.shardings(mesh, tree))
            self._placed = mesh, (placed["params"], placed["stats"])
        return self._placed[1]

    def _forward(
        self, params: Any, stats: Any, batch: Any, valid_B: Any = None, *, tasks: tuple[str, ...]
    ) -> tuple[Predictions, dict[str, Any]]:
        model = module.merge(self.parts.definition, params, stats)
        output = model(batch, tasks=tasks)
        found = {
            name: self.tasks[name].postprocess(output.predictions[name].astype(jnp.float32))
            for name in tasks
        }
        groups = len(self.classes.groups or self.tasks)
        counts = {
            path: usage_by_task(_within(record, batch.shape[0], valid_B), groups)
            for path, record in output.records.items()
        }
        return found, counts

    def _heads(
        self, params: Any, stats: Any, batch: Any, valid_B: Any = None, *, tasks: tuple[str, ...]
    ) -> dict[str, Any]:
        model = module.merge(self.parts.definition, params, stats)
        return self.subject.features(model, batch, tasks)


def _within(record: Any, rows: int, valid_B: Any) -> Any:
    """A record whose tokens of rows that only fill up a batch are of no task."""
    if valid_B is None:
        return record
    tokens = record.task_N.shape[0] // rows
    return record._replace(task_N=jnp.where(jnp.repeat(valid_B, tokens), record.task_N, -1))


def mesh_here() -> Any:
    """The mesh that is set; None where there is none, and inside of somebody's compiled function.

    Such a function has the mesh already, and JAX gives it to nobody else.
    """
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:
        return None
    return None if mesh.empty else mesh


def _first(tree: Any, count: int) -> Any:
    """The first rows of arrays, which others only fill up to what a mesh needs."""
    return jax.tree.map(lambda x: x if x.shape[0] == count else x[:count], tree)


def _finite(batch: np.ndarray) -> np.ndarray:
    """The batch; UserError where it holds numbers that are none."""
    if not np.isfinite(batch).all():
        raise UserError("The examples hold numbers that are not finite: leave those out.")
    return batch
