"""The files of an exported folder: its manifest, its checksums, its arrays, its stored outputs.

Everything is checked before it is used; whatever is wrong with a folder is one ExportError. A copy
travels in every export, beside `forms.py`, `programs.py`, `regular.py`, `schema_check.py` and
`tensor_header.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import export

if __package__:
    from moezoo import regular, tensor_header
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import forms, programs
    from moezoo.deploy.runtime.forms import ExportError
else:
    import forms  # pyright: ignore[reportMissingImports]
    import programs  # pyright: ignore[reportMissingImports]
    import regular  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]
    import tensor_header  # pyright: ignore[reportMissingImports]
    from forms import ExportError  # pyright: ignore[reportMissingImports]

AGAIN = "export it again"
MANIFEST = 64 * regular.MB
FILE = 1_000 * regular.GB
GOLDEN = 4 * regular.GB  # of a few examples and what a model makes of them
COUNTS = ("violations",)  # outputs that count; other whole numbers are names of classes
DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_manifest(folder: Path, form: Callable[[Any], None]) -> dict[str, Any]:
    """The manifest of an exported folder, which fits `form`; ExportError where it is none."""
    path = folder / "manifest.json"
    if not folder.is_dir() or not path.exists():
        raise ExportError(
            f"{folder} is not an exported folder: it has no manifest.json; "
            "moezoo export RUN --task TASK --out FOLDER makes one of a run."
        )
    content = regular.read(path, MANIFEST, ExportError, AGAIN)
    try:
        manifest = sc.parse(content)
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        newer = isinstance(schema, int) and schema > forms.SCHEMA
        if not newer:
            form(manifest)
    except forms.OtherProgram as error:
        raise ExportError(f"{folder} {error}.") from error
    except sc.FormatFault as error:
        raise ExportError(f"{path} is damaged ({error}); {AGAIN}.") from error
    if newer:
        raise ExportError(
            f"{path} has schema {sc.shown(schema)}, this program reads schema {forms.SCHEMA}."
        )
    return manifest


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ExportError where a file is not the one that was written, or JAX does not fit."""
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.exists():
            raise ExportError(f"{folder} is incomplete: {name} is missing; {AGAIN}.")
        regular.check(file, FILE, ExportError, AGAIN)
        try:
            with open(file, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ExportError(f"{file} cannot be read: {error.strerror}; {AGAIN}.") from error
        if digest != expected:
            raise ExportError(f"{file} is damaged (wrong checksum); {AGAIN}.")
    written, running = manifest["versions"]["jax"], jax.__version__
    convention = manifest["versions"]["calling_convention"]
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    fits = oldest <= convention <= newest
    if not fits or _minor(running) < _minor(written):
        raise ExportError(
            f"{folder} was written by jax {written} and this is jax {running}: use jax {written} "
            f"or one released up to six months later, or {AGAIN}."
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file, finite; raises ExportError when it is damaged.

    Before any is read, also where they do not fit in this machine's memory: a file with holes is
    larger than what it was sent as.
    """
    size, most = regular.check(path, FILE, ExportError, AGAIN), programs.machine_bytes()
    if size > most:
        raise ExportError(
            f"{path} has {size / programs.GB:,.1f} GiB of arrays, and this machine "
            f"{most / programs.GB:,.1f} GiB of memory."
        )
    try:
        with open(path, "rb") as file:
            arrays = {
                name: _array(file, name, entry)
                for name, entry in tensor_header.read(file, size).items()
            }
    except (OSError, MemoryError, ValueError) as error:  # FormatFault is a ValueError
        raise ExportError(
            f"{path} is not a readable safetensors file ({sc.first_line(error)}); {AGAIN}."
        ) from error
    return arrays


def _array(file: Any, name: str, entry: tensor_header.TensorEntry) -> np.ndarray:
    if entry.kind not in DTYPES:
        raise sc.FormatFault(f"{sc.shown(name)} has the type {entry.kind}, which no export has")
    file.seek(entry.start)
    dtype = np.dtype(DTYPES[entry.kind])
    count = (entry.end - entry.start) // dtype.itemsize
    flat = np.fromfile(file, dtype, count)
    if len(flat) != count:
        raise sc.FormatFault(f"{sc.shown(name)} is truncated")
    array = flat.reshape(entry.shape)
    if not finite(array):
        raise sc.FormatFault(f"{sc.shown(name)} has numbers that are not finite")
    return array


def finite(array: np.ndarray) -> bool:
    """Whether no number of an array is NaN or infinite."""
    if array.dtype.kind in "iub":
        return True
    return bool(np.isfinite(array.astype(np.float32) if array.dtype.kind == "V" else array).all())


def difference(value: np.ndarray, stored: np.ndarray, *, counts: bool = False) -> float:
    """How far an output is from the stored one: 0 where they are equal, infinite where it is none.

    Of numbers the largest difference, relative to the largest stored one where that is above 1; of
    names of classes the share that differs. `counts`: whole numbers are numbers, too.
    """
    if value.shape != stored.shape or value.dtype != stored.dtype:
        return float("inf")
    if not finite(value) or not finite(stored):
        return float("inf")
    if not value.size:
        return 0.0
    if value.dtype.kind in "iub" and not counts:
        return float(np.mean(value != stored))
    value, stored = value.astype(np.float64), stored.astype(np.float64)
    scale = max(1.0, float(np.max(np.abs(stored))))
    return float(np.max(np.abs(value - stored))) / scale


def check_outputs(
    folder: Path,
    manifest: Mapping[str, Any],
    outputs: Mapping[str, np.ndarray],
    golden: Mapping[str, np.ndarray],
) -> float:
    """What `Predictor.self_check` says of outputs and the stored ones under the same names."""
    limits = manifest["golden"]
    tolerance = limits.get(jax.default_backend(), limits["other"])
    worst = 0.0
    for name, value in outputs.items():
        if name not in golden:
            raise ExportError(f"{folder / 'golden.safetensors'} has no {name}; {AGAIN}.")
        apart = difference(value, golden[name], counts=name in COUNTS)
        if not apart <= tolerance:
            raise ExportError(
                f"{folder} gives other outputs on this machine: {name} is {apart:.2g} off the "
                f"stored ones, where {tolerance:g} is allowed; {AGAIN}."
            )
        worst = max(worst, apart)
    return worst


def check_classes(prediction: np.ndarray, count: int) -> None:
    """ExportError for an index that is none of so many classes."""
    if prediction.size and not 0 <= int(prediction.min()) <= int(prediction.max()) < count:
        raise ExportError(
            f"The program predicts the classes {prediction.min()} to {prediction.max()}, of which "
            f"there are {count}; {AGAIN}."
        )


def stored_inputs(folder: Path, names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """golden.safetensors, which has at least these; raises ExportError where it has not."""
    regular.check(folder / "golden.safetensors", GOLDEN, ExportError, AGAIN)
    golden = read_tensors(folder / "golden.safetensors")
    for name in names:
        if name not in golden:
            raise ExportError(f"{folder / 'golden.safetensors'} has no {name}; {AGAIN}.")
    return golden
