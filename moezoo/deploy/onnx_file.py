"""A path as `model.onnx`, for ONNX Runtime and servers that take such files; needs the extra onnx.

The file has the path's input under its name, of any batch size, and the outputs `logits`,
`prediction` and `violations`. It is checked by onnx, and run by ONNX Runtime on the examples that
the export stores, together and one by one, before the export has its name.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export as jax_export

from moezoo.deploy import onnx_graph, onnx_operations
from moezoo.deploy.path import TaskPath
from moezoo.deploy.runtime import other_forms
from moezoo.deploy.specialise import copy_of, layers_of
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.ops import grouped
from moezoo.schema_check import FormatFault
from moezoo.tasks.base import Task

NAME = other_forms.FORMS["onnx"].file
APART = f"{NAME}.data"
LARGEST = 1 << 30  # bytes of weights in one file; protobuf ends at twice that


def check(weights: str) -> None:
    """UserError where the packages are missing, or for a type of weights that has no place here."""
    onnx_graph.libraries()
    if weights == "bfloat16":
        raise UserError(
            "ONNX runtimes hardly know bfloat16: with --formats onnx take int8 or float32 weights."
        )


def portable(path: TaskPath) -> TaskPath:
    """The same path with operations that other runtimes have.

    Every expert sees every token, E/K times the work of sorting: runtimes have no product of groups
    of rows, and sorting with sizes that the data decide has no form that all of them take.
    """
    made = copy_of(path.module(path.weights))
    for layer in layers_of(made).values():
        layer.apply = grouped.reference
    return replace(path, definition=module.split(made).definition)


def converted(path: TaskPath, task: Task) -> Any:
    """The path as an `onnx.ModelProto`; UserError where a part of it has no form in ONNX."""
    from moezoo.deploy.export import outputs

    (batch,) = jax_export.symbolic_shape(onnx_graph.BATCH)
    weights = jax.device_get(path.weights)
    call = outputs(portable(path), task)
    return onnx_operations.convert(call, weights, path.input.batch(batch), path.input.name)


def write(folder: Path, path: TaskPath, task: Task, given: np.ndarray) -> dict[str, Any]:
    """Write `model.onnx` into a folder; what a manifest says of it.

    given: a few examples, on which ONNX Runtime must give what the path gives. Raises UserError
    where it does not.
    """
    onnx, runtime = onnx_graph.libraries()
    made, file = converted(path, task), folder / NAME
    apart = sum(int(w.nbytes) for w in path.weights.values()) > LARGEST
    onnx.save_model(made, str(file), save_as_external_data=apart, location=APART)
    for one in (file, folder / APART):
        if one.exists():
            one.chmod(0o644)  # external data is written for the owner only
    onnx.checker.check_model(str(file), full_check=True)
    off = compared("onnx", folder, path, task, given)
    return {
        "opset": onnx_graph.OPSET,
        "nodes": len(made.graph.node),
        "checked_with": f"onnxruntime {runtime.__version__}",
        "largest_difference": off,
    }


def compared(kind: str, folder: Path, path: TaskPath, task: Task, given: np.ndarray) -> float:
    """How far the outputs of a file for another runtime are from the path's.

    kind: of `other_forms.FORMS`.   given: examples. Raises UserError where that is too much.
    """
    from moezoo.deploy.export import outputs

    form, made = other_forms.FORMS[kind], jax.jit(outputs(path, task))(path.weights, given)
    wanted = {name: np.asarray(value) for name, value in made.items()}
    assert form.run is not None
    try:
        return other_forms.apart(form, form.run(folder / form.file, path.input.name), given, wanted)
    except FormatFault as error:
        raise UserError(
            f"What {kind} makes of the {path.task} path is not what JAX does ({error}): leave it "
            "out of --formats."
        ) from error
