"""Scoring a model on a source, and a checkpoint outside training: `moezoo evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.train import mesh as meshes
from moezoo.train import placement
from moezoo.train.checkpoint import load_params
from moezoo.train.config import Config, EvaluateConfig, MeshConfig
from moezoo.train.console import Console
from moezoo.train.evaluate import Evaluation, evaluate, make_count
from moezoo.train.restore import read_config
from moezoo.train.setup import Setup, prepare


def placed(setup: Setup, batches: Iterable[dict[str, np.ndarray]], size: int) -> Iterator[dict]:
    """Batches on the mesh's devices, each host giving its own rows."""
    for batch in batches:
        yield meshes.place(setup.mesh, batch, size)


def nothing() -> None:
    """What happens between two batches unless someone wants more."""


def run_evaluation(
    setup: Setup,
    definition: Any,
    params: Any,
    stats: Any,
    console: Console,
    source: Any = None,
    between: Callable[[], None] = nothing,
) -> Evaluation:
    """Scores and expert usage on a source, by default the test split.

    Where `evaluate.examples` is given, on its first so many examples. `between` is called after
    every batch; what it raises ends the evaluation.
    """
    source = setup.test if source is None else source
    config, mesh = setup.config, setup.mesh
    count = min(config.evaluate.examples or len(source), len(source))
    size = size_of(config, meshes.batch_shards(mesh), count)
    names, rows, domain = setup.truths, meshes.rows(mesh, size), setup.domain
    batches = domain.evaluation(source, count, size, names, rows)
    with console.progress("evaluate", count, unit=domain.unit) as bar:
        bar.doing("compiling")

        def progress(examples: int) -> None:
            bar.advance(examples)
            between()

        return evaluate(
            make_count(definition, setup.tasks, domain.read, len(setup.groups)),
            params,
            stats,
            setup.tasks,
            placed(setup, batches, size),
            progress,
        )


def size_of(config: Config, shards: int, count: int) -> int:
    """Examples in a batch of an evaluation on `count` of them: no more than there are.

    Rounded up to what splits evenly over `shards` devices.
    """
    return -(-min(config.evaluate.batch or config.train.batch, count) // shards) * shards


def score_run(
    path: Path,
    change: Callable[[EvaluateConfig], EvaluateConfig] = lambda evaluate: evaluate,
    json_file: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Scores of a run's newest valid checkpoint on its test split, on this machine's devices.

    `change` adapts the evaluation's settings. Raises UserError where `path` holds no checkpoint.
    """
    console = console or Console()
    check_file(json_file)
    config = read_config(path)
    # The run's mesh belongs to the machine it was trained on.
    config = replace(config, evaluate=change(config.evaluate), mesh=MeshConfig())
    setup = prepare(config)
    parts = module.abstract(setup.build)
    target = {"params": parts.params, "stats": parts.stats}
    places = placement.shardings(setup.mesh, target)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), target, places
    )
    with jax.set_mesh(setup.mesh):
        loaded = load_params(path, target, console.say)
        result = run_evaluation(setup, parts.definition, loaded["params"], loaded["stats"], console)
    rows = [(task, name, value) for task, s in result.scores.items() for name, value in s.items()]
    console.table(f"{path}, step {loaded['step']}", ("task", "score", "value"), rows)
    if json_file is not None:
        there = len(setup.test)
        examples = min(config.evaluate.examples or there, there)
        content = {"run": config.name, "step": loaded["step"], "split": "test"}
        content |= {"examples": examples, "of": there, "scores": result.scores}
        write_atomically(json_file, json_text(content, 2))
    return result
