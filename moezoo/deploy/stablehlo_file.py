"""A path as plain StableHLO of an older version, for compilers that are not JAX (IREE, PJRT).

`model.stablehlo`, which every export has, is JAX's own container around a program for three
platforms; only JAX of about the same age reads it. This file is the bare program for one example on
a CPU, in the version of StableHLO that was current twelve weeks before this JAX, with fixed sizes,
which is what other compilers want. Its arguments are the weights in the order of their names, then
the input; its results `logits`, `prediction` and `violations`. StableHLO promises to read such
files for five years (https://openxla.org/stablehlo/compatibility).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export as jax_export
from jaxlib.mlir.dialects import stablehlo

from moezoo.deploy.path import TaskPath, no_source_locations, shapes
from moezoo.deploy.runtime import folder as files
from moezoo.deploy.runtime.other_forms import FORMS
from moezoo.errors import UserError
from moezoo.tasks.base import Task

NAME = FORMS["stablehlo"].file
OFF = 1e-5  # of outputs, relative to the largest: it is the same program


class OlderProgram(NamedTuple):
    """The program as it is written, its version, and how JAX calls it."""

    content: bytes
    version: str
    exported: jax_export.Exported


def check(weights: str) -> None:
    """Any weights have a form in StableHLO."""


def converted(path: TaskPath, task: Task) -> OlderProgram:
    """The path for one example; UserError where older versions lack one of its operations."""
    from moezoo.deploy.export import outputs

    with no_source_locations():
        lowered = jax_export.export(jax.jit(outputs(path, task)), platforms=("cpu",))
        exported = lowered(shapes(path.weights), path.input.batch(1))
    age = stablehlo.StablehloCompatibilityRequirement.WEEK_12
    version = stablehlo.get_version_from_compatibility_requirement(age)
    try:
        content = stablehlo.serialize_portable_artifact_str(exported.mlir_module(), version)
    except ValueError as error:
        raise UserError(
            f"The {path.task} path has operations that StableHLO {version} does not have: leave "
            "out --formats stablehlo."
        ) from error
    return OlderProgram(content, version, replace(exported, mlir_module_serialized=content))


def write(folder: Path, path: TaskPath, task: Task, given: np.ndarray) -> dict[str, Any]:
    """Write `model.batch1.stablehlo` into a folder; what a manifest says of it.

    given: a few examples, on which it must give what the path gives. Raises UserError where it does
    not.
    """
    from moezoo.deploy.export import outputs

    made = converted(path, task)
    (folder / NAME).write_bytes(made.content)
    call, worst = jax.jit(outputs(path, task)), 0.0
    for row in (given[i : i + 1] for i in range(len(given))):
        wanted: Any = call(path.weights, row)
        found: Any = made.exported.call(path.weights, row)
        for name, value in wanted.items():
            counts = name in files.COUNTS
            off = files.difference(np.asarray(found[name]), np.asarray(value), counts=counts)
            if not off <= OFF:
                raise UserError(
                    f"The program in StableHLO {made.version} gives another {name} for the "
                    f"{path.task} path, by {off:.2g}: leave out --formats stablehlo."
                )
            worst = max(worst, off)
    return {"version": made.version, "batch": 1, "largest_difference": worst}
