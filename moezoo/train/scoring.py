"""Scoring a checkpoint outside training: the work of `tools/evaluate.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax

from moezoo.nn import module
from moezoo.train import placement
from moezoo.train.checkpoint import load_params
from moezoo.train.config import EvaluateConfig, MeshConfig
from moezoo.train.console import Console
from moezoo.train.evaluate import Evaluation
from moezoo.train.files import write_atomically
from moezoo.train.loop import run_evaluation
from moezoo.train.restore import read_config
from moezoo.train.setup import prepare


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
        text = json.dumps({"step": loaded["step"], "scores": result.scores}, indent=2)
        write_atomically(json_file, text + "\n")
    return result
