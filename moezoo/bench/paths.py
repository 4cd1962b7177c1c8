"""Every model's path for every task: what became of its experts, how far it is from the model.

The table that `moezoo bench paths` prints. Nothing is trained or calibrated for it: paths hold all
experts that a task can ask for, so that all of them should give what the whole model gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from moezoo import registry
from moezoo.command import Positional, parse
from moezoo.deploy import cost, onnx_file, onnx_graph, task_path
from moezoo.deploy.exporter import Exporter
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import TaskPath
from moezoo.deploy.runtime import other_forms
from moezoo.deploy.specialise import copy_of, layers_of
from moezoo.errors import UserError
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.train import config_file
from moezoo.train.config import Config
from moezoo.train.console import Console
from moezoo.train.domain import Classes
from moezoo.train.setup import Loaded, make_builder, make_tasks

ROWS = 4  # examples that path and model are compared on
HEADER = ("model", "task", "layers", "off by", "parameters", "of the model", "GFLOP", "ms")
HEADER += ("ms, ONNX Runtime",)


class PathFacts(NamedTuple):
    """One task's path beside the model that it was cut out of.

    kinds: how many layers with experts became what (`deploy.path.PathLayer.kind`), by the router's
    kind of decision. apart: the largest difference of logits, as a share of the largest logit; 0
    where bits are equal. parameters, full: of path and model. flops: for one example.
    """

    task: str
    kinds: dict[str, int]
    apart: float
    parameters: int
    full: int
    flops: int


def path_facts(loaded: Loaded, classes: Classes, task: str, rows: int = ROWS) -> PathFacts:
    """The facts of one task's path.

    Raises UserError, one sentence, for a task that has no path.
    """
    path, exporter = whole_path(loaded, classes, task)
    subject = exporter.subject(loaded, classes)
    parts = module.split(dropless(subject.model))
    given = drawn(path.input, rows)

    @jax.jit
    def full(params: Any, stats: Any, given: Any) -> Any:
        model = module.merge(parts.definition, params, stats)
        return model(given, tasks=(task,)).predictions[task]

    wanted = np.asarray(full(parts.params, parts.stats, given), np.float32)
    found = np.asarray(path(given).logits)
    size = loaded.config.data.domain.size(loaded.config)
    return PathFacts(
        task,
        dict(Counter(f"{one['kind']} ({one['decision']})" for one in path.report.values())),
        float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-30)),
        cost.parameters(path.weights),
        module.count(parts.params) + module.count(parts.stats),
        cost.flops_of(path, loaded.config.model, size, subject.tasks[task]),
    )


def drawn(reads: InputSpec, rows: int) -> np.ndarray:
    """Random examples: normal numbers, or whole ones where those are read."""
    rng, shape = np.random.default_rng(0), (rows, *reads.shape)
    if np.issubdtype(np.dtype(reads.dtype), np.integer):
        return rng.integers(0, 100, shape).astype(reads.dtype)
    return rng.normal(size=shape).astype(reads.dtype)


def dropless(model: Any) -> Any:
    """A copy whose layers give every token its experts, as paths do and capacities do not."""
    made = copy_of(model)
    for layer in layers_of(made).values():
        layer.apply = task_path.BACKEND
    return made


def whole_path(loaded: Loaded, classes: Classes, task: str) -> tuple[TaskPath, Exporter]:
    """One task's path with all that it can ask for; UserError for a task that has none."""
    exporter: Exporter = registry.exporters(loaded.config)[task]
    exporter.check(task)
    subject = exporter.subject(loaded, classes)
    return subject.cut(subject.model, task, exporter.input), exporter


@dataclass(frozen=True)
class PathsArguments:
    """Cut every task's path out of models and hold them beside the models, as a table.

    Example: moezoo bench paths rooms/m3vit_tiny rooms/vmoe_tiny
    """

    models: Annotated[tuple[str, ...], Positional] = ()
    """Names of models; all of those named ..._tiny where none is given."""
    tasks: int | None = None
    """Tasks of a model, its first ones; default: all."""
    json: Path | None = None
    """File for the numbers."""

    def __post_init__(self) -> None:
        if self.tasks is not None and self.tasks < 1:
            raise UserError(f"--tasks is {self.tasks}: at least 1 is needed.")


def run(words: list[str]) -> int:
    """The command; words: its arguments."""
    given, console = parse(PathsArguments, words, "moezoo bench paths"), Console()
    check_file(given.json)
    names = given.models or tuple(n for n in config_file.names() if n.endswith("_tiny"))
    rows, numbers = [], []
    for name in names:
        config = config_file.load(name)
        classes = config.data.domain.example(config)[1]
        loaded = fresh(replace(config, start_from=None), classes)
        for task in list(registry.exporters(config))[: given.tasks]:
            try:
                facts = path_facts(loaded, classes, task)
            except UserError as error:
                console.say(f"{name}, {task}: {error}")
                continue
            timed = latency(loaded, classes, task)
            rows.append((name, *row(facts, timed)))
            numbers.append({"model": name, **facts._asdict(), "latency": timed})
    console.say(f"random weights, float32, {cost.device()}; ms: median of one example")
    console.say(markdown(rows))
    if given.json is not None:
        write_atomically(given.json, json_text({"device": cost.device(), "paths": numbers}, 1))
    return 0


def fresh(config: Config, classes: Classes) -> Loaded:
    """The configured model with random weights, decided by its seed."""
    tasks = make_tasks(config, classes)
    parts = module.create(make_builder(config, tasks))
    generator = np.random.default_rng(config.seed)

    def moved(array: jax.Array) -> jax.Array:
        # Heads and adapters begin with zeros: every path would give what the model does.
        return array + np.asarray(0.02 * generator.normal(size=array.shape), array.dtype)

    params = jax.tree.map(moved, parts.params)
    return Loaded(config, tasks, module.merge(parts.definition, params, parts.stats), 0)


def latency(loaded: Loaded, classes: Classes, task: str) -> dict[str, Any]:
    """Milliseconds of one example through a task's path, compiled by JAX and in ONNX Runtime.

    None for the latter where its packages are not installed.
    """
    path, exporter = whole_path(loaded, classes, task)
    found = {"jax": cost.latency(path, 1, path.input)["median_ms"], "onnx": None}
    try:
        onnx_graph.libraries()
    except UserError:
        return found
    given = drawn(path.input, 1)
    with TemporaryDirectory() as folder:
        whole = exporter.subject(loaded, classes).tasks[task]
        onnx_file.write(Path(folder), path, whole, given)
        run = other_forms.FORMS["onnx"].run
        assert run is not None
        call = run(Path(folder) / onnx_file.NAME, path.input.name)
        one = cost.latency(lambda given: call(np.asarray(given)), 1, path.input)
        return found | {"onnx": one["median_ms"]}


def row(facts: PathFacts, timed: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table behind the model's name, under HEADER."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts.kinds.items())
    return (
        facts.task,
        kinds or "no experts",
        f"{facts.apart:.1g}",
        f"{facts.parameters:,}",
        f"{100 * facts.parameters / facts.full:.0f} %",
        f"{facts.flops / 1e9:.3f}",
        f"{timed['jax']:.1f}",
        "-" if timed["onnx"] is None else f"{timed['onnx']:.1f}",
    )


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """The table in Markdown."""
    lines = [HEADER, ("---",) * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
