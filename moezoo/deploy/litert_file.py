"""A path as `model.tflite`, for LiteRT on phones and small devices; needs LiteRT and its converter.

The file has one signature, `serving_default`: the path's input under its name, one example at a
time, and the outputs `logits`, `prediction` and `violations`. LiteRT's own converter makes it from
the path's program; LiteRT's interpreter runs it on the examples that the export stores before the
export has its name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jaxlib.mlir.dialects import stablehlo

from moezoo.deploy import onnx_file
from moezoo.deploy.path import TaskPath, no_source_locations
from moezoo.deploy.runtime.other_forms import FORMS
from moezoo.errors import UserError
from moezoo.tasks.base import Task

NAME, SIGNATURE = FORMS["litert"].file, "serving_default"
LARGEST = 1 << 30  # bytes of weights; the file's numbers for places end at twice that
# The converter's own requirement, xdsl 0.28, holds typing-extensions below what tyro needs, and is
# for tools that are not used here: pip cannot install both, and an extra cannot leave one out.
MISSING = (
    "Writing LiteRT needs its interpreter and its converter: pip install ai-edge-litert, then "
    "pip install --no-deps litert-converter."
)


def libraries() -> tuple[Any, Any]:
    """MLIR of the converter and its passes; UserError where they or the interpreter are missing."""
    try:
        import ai_edge_litert.interpreter  # pyright: ignore # noqa: F401
        from litert_converter import converter_api_ext  # pyright: ignore
        from litert_converter.mlir import ir, passmanager  # pyright: ignore
        from litert_converter.mlir.dialects import stablehlo as dialect  # pyright: ignore
    except ImportError as error:
        raise UserError(MISSING) from error
    return (ir, passmanager, dialect), converter_api_ext


def check(weights: str) -> None:
    """UserError where the packages are missing, or for a type of weights that has no place here."""
    libraries()
    if weights != "float32":
        raise UserError(
            f"LiteRT's converter writes {weights} weights back as float32, which saves nothing: "
            "with --formats litert leave out --weights."
        )


def converted(path: TaskPath, task: Task) -> bytes:
    """The path for one example as a file's content; UserError where a part of it has no form.

    Every expert sees every token, as in ONNX (`onnx_file.portable`).
    """
    from moezoo.deploy.export import outputs

    (ir, passmanager, dialect), converter = libraries()
    size = sum(int(w.nbytes) for w in path.weights.values())
    if size > LARGEST:
        raise UserError(
            f"The {path.task} path has {size:,} bytes of weights, a LiteRT file has room for "
            f"{LARGEST:,}: leave out --formats litert, or keep fewer experts."
        )
    held, call = jax.device_get(path.weights), outputs(onnx_file.portable(path), task)

    def baked(given: Any) -> Any:
        # JAX's arrays: a NumPy array cannot be read at places that the program computes.
        return call({name: jnp.asarray(w) for name, w in held.items()}, given)

    with no_source_locations():
        traced = jax_export.export(jax.jit(baked), platforms=("cpu",))
        exported = traced(path.input.batch(1))
    # In a version of StableHLO that both JAX and the converter know.
    known = (one.get_current_version() for one in (stablehlo, dialect))
    version = stablehlo.get_smaller_version(*known)
    program = stablehlo.serialize_portable_artifact_str(exported.mlir_module(), version)
    names = sorted(jax.tree.unflatten(exported.out_tree, exported.out_avals))
    context = ir.Context()
    converter.prepare_mlir_context(context)
    with context:
        try:
            made = ir.Module.parse(dialect.deserialize_portable_artifact_str(program))
            converter.set_signature(made.operation, SIGNATURE, [path.input.name], names)
            passes = passmanager.PassManager()
            converter.run_convert_to_tfl_passes(made, passes, converter.ConvertToTFLConfig())
            return converter.export_flatbuffer_to_bytes(made.operation)
        except Exception as error:  # MLIR's own, of no common kind
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"LiteRT's converter cannot write the {path.task} path ({said}): leave out "
                "--formats litert."
            ) from error


def write(folder: Path, path: TaskPath, task: Task, given: np.ndarray) -> dict[str, Any]:
    """Write `model.tflite` into a folder; what a manifest says of it.

    given: a few examples, on which the interpreter must give what the path gives. Raises UserError
    where it does not.
    """
    (folder / NAME).write_bytes(converted(path, task))
    off = onnx_file.compared("litert", folder, path, task, given)
    return {"batch": 1, "largest_difference": off}
