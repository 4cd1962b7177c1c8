"""A task path as a folder that runs without moezoo.

manifest.json       what it is: task, labels, input, outputs, pre- and post-processing,
                    certificate, versions, checksum of every other file
model.safetensors   the weights, one array per name
model.stablehlo     the computation (`jax.export`): CPU, CUDA and TPU, any batch size; the
                    weights are its first argument, under the same names
config.json         the run's configuration and the pruning plan: enough to build it again
certificate.json    what was proved or measured about the path
golden.safetensors  inputs and their outputs, for a check on the machine that runs it
predict.py          loader and command, needs JAX, NumPy, flatbuffers and Pillow only; with
                    the files beside it, which it imports: `LOADING` in every export, and
                    those that read its kind of input (`InputSpec.files`)
verify.py           runs the program again and checks what the folder says of itself; SciPy, too
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from jax import export

from moezoo import registry, regular, schema_check, storage, tensor_header
from moezoo.deploy import manifest
from moezoo.deploy.input_spec import InputSpec
from moezoo.deploy.path import TaskPath, no_source_locations, shapes
from moezoo.deploy.runtime import (
    drawing,
    forms,
    limited,
    load,
    operations,
    other_forms,
    programs,
    verify,
)
from moezoo.deploy.runtime import folder as files
from moezoo.errors import UserError
from moezoo.files import check_writable, failure
from moezoo.json_text import json_text
from moezoo.tasks.base import Task

NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")  # of an input: a module's, too
LIBRARIES = {"jax", "jaxlib", "numpy", "ml_dtypes", "PIL", "scipy", "flatbuffers", "soundfile"}
PROGRAMS = ("predict.py", *forms.OTHERS.values())  # one of them lies in every export
PLATFORMS = ("cpu", "cuda", "tpu")
LOADING = {"predict.py": load, "folder.py": files, "forms.py": forms, "drawing.py": drawing}
LOADING |= {"programs.py": programs, "operations.py": operations, "regular.py": regular}
LOADING |= {"limited.py": limited, "schema_check.py": schema_check}
LOADING |= {"tensor_header.py": tensor_header}
CHECKING = {**LOADING, "verify.py": verify, "other_forms.py": other_forms}


class Content(NamedTuple):
    """What an export is written from.

    about: facts of the manifest that the path does not know: labels, source, licence.
    config: the run's configuration as JSON-able data.   certificate: likewise, {} for none.
    golden: a few examples of the path's input.
    """

    path: TaskPath
    task: Task
    about: manifest.Facts
    config: Mapping[str, Any]
    certificate: Mapping[str, Any]
    golden: np.ndarray


def outputs(path: TaskPath, task: Task) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    """The exported function: (weights, batch) -> logits, prediction, violations."""

    def call(weights: Mapping[str, Any], given: Any) -> dict[str, Any]:
        logits, violations_B = path.call(weights, given)
        prediction = task.postprocess(logits)
        return {"logits": logits, "prediction": prediction, "violations": violations_B}

    return call


def lower(path: TaskPath, task: Task) -> export.Exported:
    """The path as StableHLO for every platform, with a symbolic batch size.

    Raises UserError when a part of the path cannot be lowered for one of them.
    """
    (batch,) = export.symbolic_shape("b")
    jitted = jax.jit(outputs(path, task))
    try:
        with no_source_locations():
            lowered = export.export(jitted, platforms=PLATFORMS)
            return lowered(shapes(path.weights), path.input.batch(batch))
    except (NotImplementedError, ValueError, TypeError) as error:
        raise UserError(
            f"The {path.task} path cannot be exported for {', '.join(PLATFORMS)} with any batch "
            f"size: {str(error).splitlines()[0]}"
        ) from error


Further = Mapping[str, Any]


def nothing(folder: Path) -> Further:
    """Write nothing more, check nothing."""
    return {}


def check_input(spec: InputSpec) -> None:
    """UserError where no program could read an export with this input; call it before long work."""
    name, taken = spec.name, {Path(file).stem for file in CHECKING} | sys.stdlib_module_names
    if name in taken | LIBRARIES or not NAME.fullmatch(name):
        raise UserError(
            f"An export's input cannot be called '{name}', as a module that every export has: "
            "choose another name of small letters, digits and _ for the InputSpec."
        )
    reader = registry.reader(name)
    missing = load.lacking(reader)
    if missing:
        raise UserError(
            f"{reader.__name__}, which is to read inputs called {name}, has no "
            f"{', '.join(missing)}: see moezoo.deploy.runtime.load.Reader."
        )
    try:
        steps = schema_check.parse(json_text(spec.preprocess, None))
        reader.STEPS(steps, "preprocess")
        reader.fits(list(spec.shape), steps, f"inputs.{name}.shape")
    except schema_check.FormatFault as error:
        raise UserError(
            f"{reader.__name__} does not read what the InputSpec {name} says: {error}."
        ) from error


def read_back(temporary: Path, folder: Path, load: Callable[[Path], Any]) -> float:
    """How far outputs of an export are off that was just written and has no name yet.

    temporary: where it lies.   folder: its name to be.   load: gives what has a `self_check`.
    Raises UserError where it cannot be used.
    """
    try:
        return load(temporary).self_check()
    except forms.ExportError as error:
        words = str(error).replace(str(temporary), str(folder))
        raise UserError(f"{folder} was written but cannot be used: {words}") from error


def write(
    folder: Path,
    content: Content,
    *,
    more: Callable[[Path], Further] = nothing,
    check: Callable[[Path], object] = nothing,
    replace: bool = False,
) -> Path:
    """Write an export; it appears under its name complete or not at all.

    `more` may write further files into the folder that it is given, and says what the manifest says
    of them; `check` may look at the complete one before it has its name. Raises UserError when
    `folder` exists (an older export is replaced only with `replace`), where the disk does not
    take it, and for weights and outputs that are not finite.
    """
    folder = storage.place(folder)
    check_free(folder, replace=replace)
    check_finite(content.path.weights, f"The {content.path.task} path", "weights")
    with written(folder) as temporary:
        _fill(temporary, content, more)
        check(temporary)
    return folder


@contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name of `folder`, and its place, when the block ends well.

    Whatever ends the block otherwise, nothing stays and an older `folder` is as it was. Raises
    UserError where the disk does not take it.
    """
    if storage.is_stored(folder):
        try:
            with storage.written(folder) as temporary:
                yield temporary
        except OSError as error:
            raise failure("write", folder, error) from error
        return
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    except OSError as error:
        raise failure("write", folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path, *, replace: bool = False, mark: str = "manifest.json") -> None:
    """UserError when an export cannot go to `folder`; call it before long work.

    mark: the file by which an older folder of the kind is known, which `replace` may replace.
    """
    folder = storage.place(folder)
    check_writable(folder.absolute().parent)
    if storage.is_stored(folder) and storage.free(folder):
        return
    if folder.is_symlink():
        raise UserError(f"{folder} is a link: name the folder itself, or another one.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    # A manifest alone is no sign of an export: checkpoints and others' folders have one, too.
    own = mark != "manifest.json" or any((folder / name).is_file() for name in PROGRAMS)
    if not (own and (folder / mark).is_file()):
        what = "is no export" if mark == "manifest.json" else f"holds no {mark}"
        raise UserError(f"{folder} exists and {what}: choose another folder.")
    if not replace:
        raise UserError(f"{folder} exists: choose another folder, or add --replace.")


def check_finite(arrays: Mapping[str, Any], what: str, kind: str) -> None:
    """UserError for numbers that are NaN or infinite, with the names of the arrays."""
    broken = [name for name, array in arrays.items() if not files.finite(np.asarray(array))]
    if broken:
        others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise UserError(
            f"{what} has {kind} that are not finite numbers ({broken[0]}{others}): its training "
            "diverged; take a checkpoint from before that."
        )


def _fill(folder: Path, content: Content, more: Callable[[Path], Further]) -> None:
    path, task = content.path, content.task
    exported = lower(path, task)
    weights = {name: np.asarray(w) for name, w in path.weights.items()}
    save_tensors(folder / "model.safetensors", weights)
    (folder / "model.stablehlo").write_bytes(bytes(exported.serialize()))
    config = {
        **content.config,
        "path": {"task": path.task, "plan": json.loads(path.plan.to_json())},
    }
    (folder / "config.json").write_text(_json(config))
    (folder / "certificate.json").write_text(_json(content.certificate))
    given = np.ascontiguousarray(content.golden, path.input.dtype)
    logits, violations_B = path(given)
    prediction = task.postprocess(logits)
    golden = {"logits": logits, "prediction": prediction, "violations": violations_B}
    check_finite(golden, f"The {path.task} path", "outputs")
    save_tensors(
        folder / "golden.safetensors",
        {path.input.name: given} | {k: np.asarray(v) for k, v in golden.items()},
    )
    for name, module in {**CHECKING, **path.input.files}.items():
        shutil.copyfile(str(module.__file__), folder / name)
    facts = more(folder)
    described = manifest.describe(path, task, content.about, exported, golden)
    write_manifest(folder, {**described, **facts, "certificate": content.certificate})


def write_manifest(folder: Path, described: Mapping[str, Any]) -> None:
    """The manifest, with the checksum of every file that is there."""
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    sums = {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in found
    }
    (folder / "manifest.json").write_text(_json({**described, "files": sums}))


def save_tensors(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file; equal arrays give equal bytes.

    The format stores C order and silently writes wrong data for anything else; more than one
    metadata key is written in random order, so there is exactly one.
    """
    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    file.write_bytes(safetensors.numpy.save(ordered, metadata={"format": "moezoo"}))


def _json(value: Mapping[str, Any]) -> str:
    return json_text(value, 1, sort_keys=True)
