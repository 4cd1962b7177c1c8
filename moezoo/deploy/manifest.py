"""The manifest of an export: everything a user or a server has to know, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import flax
import jax
import jaxlib
import numpy as np
from jax import export

import moezoo
from moezoo.deploy.path import TaskPath
from moezoo.deploy.runtime.load import SCHEMA
from moezoo.tasks.base import Task

# Differences to expect from the stored outputs, relative to the largest one. Accelerators round the
# inputs of float32 products by default, and a token near a tie may then go to another expert.
TOLERANCE = {"cpu": 1e-5, "other": 5e-2}


class Facts(NamedTuple):
    """What the path does not know about itself.

    labels: class names in order, () for tasks without classes.
    """

    labels: tuple[str, ...] = ()
    source: str = ""
    training_data: str = ""
    licence: str = "the licence of the weights is that of their training; moezoo is Apache-2.0"


def describe(
    path: TaskPath,
    task: Task,
    facts: Facts,
    exported: export.Exported,
    golden: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest without certificate and checksums."""
    return {
        "schema": SCHEMA,
        "task": _task(task, facts),
        "inputs": {path.input.name: path.input.described()},
        "preprocess": [dict(step) for step in path.input.preprocess],
        "outputs": {name: _output(name, value, task) for name, value in golden.items()},
        "postprocess": path.input.postprocess,
        "picture": task.painting(),
        "path": {
            "kind": "exact" if path.exact else "pruned",
            "layers": path.report,
            "plan": path.plan.digest(),
            "parameters": sum(int(np.prod(w.shape)) for w in path.weights.values()),
        },
        "golden": TOLERANCE,
        "versions": versions(exported),
        "source": facts.source,
        "training_data": facts.training_data,
        "licence": facts.licence,
    }


def _task(task: Task, facts: Facts) -> dict[str, Any]:
    described: dict[str, Any] = {"name": task.name, "unit": task.prediction.unit}
    if facts.labels:
        described |= {"labels": list(facts.labels), "ignore_label": 255}
    return described


def _output(name: str, value: Any, task: Task) -> dict[str, Any]:
    meaning = {
        "logits": "raw network output",
        "prediction": task.prediction.unit,
        "violations": "tokens, over all layers, that asked for a removed expert; 0 = exactly the "
        "full model's output",
    }
    return {
        "dtype": str(value.dtype),
        "shape": ["b", *value.shape[1:]],
        "meaning": meaning[name],
    }


def versions(exported: export.Exported) -> dict[str, Any]:
    """What wrote a program, and what can read it."""
    return {
        "moezoo": moezoo.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
        "numpy": np.__version__,
        "calling_convention": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "readable_by": f"jax {jax.__version__} and every jax released up to six months later",
    }
