"""Run an exported folder. Needs JAX, NumPy and flatbuffers; Pillow for pictures; not moezoo.

This file imports nothing of the package but what lies beside it, because a copy of it travels in
every export as `predict.py`:

    python predict.py photo.jpg --out picture.png
    python predict.py clip.wav --out picture.png
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import export

if __package__:
    from moezoo.deploy import photo
else:  # in an export, even where Python leaves a script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.dont_write_bytecode = True  # the folder stays as it was written
    import photo  # pyright: ignore[reportMissingImports]

ExportError = photo.ExportError
SCHEMA = 1
INPUTS = ("image", "audio")
REQUIRED = ("task", "files", "preprocess", "outputs", "picture", "golden")
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


class Predictor:
    """An export that is ready to be called; thread-safe, holds no state but the weights."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], exported: Any) -> None:
        self.folder = folder
        self.manifest = manifest
        ((self.input, form),) = manifest["inputs"].items()
        self.size: tuple[int, int] = tuple(form["shape"][1:3])
        self._weights = jax.device_put(read_tensors(folder / "model.safetensors"))
        self._call = jax.jit(exported.call)

    def __call__(self, given: Any) -> dict[str, np.ndarray]:
        """Predict a batch.

        given: uint8 [B, height, width, 3] of any size (RGB photos, resized and normalised here); of
        a model of sounds B mono waveforms float32 [samples] of the manifest's rate; or float32 that
        is already what the manifest's `preprocess` leads to, [B, H, W, 3] or [B, frames, bands].
        Returns the manifest's `outputs`, NumPy, B rows each. The batch is padded to a power of
        two, so that few programs are compiled. Raises ExportError for any other shape or type.
        """
        batch = self.prepare(given)
        outputs = self._call(self._weights, filled(batch))
        return {name: np.asarray(value)[: len(batch)] for name, value in outputs.items()}

    def prepare(self, given: Any) -> np.ndarray:
        """The network's input: the manifest's `preprocess` steps, float32."""
        if self.input == "audio":
            return hearing().prepare(given, self.size, self.manifest["preprocess"])
        return photo.prepare(np.asarray(given), self.size, self.manifest["preprocess"])

    def self_check(self) -> float:
        """Largest difference from the stored outputs for the stored inputs.

        Relative to the largest stored value where that is above 1. Raises ExportError when it
        exceeds the manifest's tolerance for this platform.
        """
        golden = read_tensors(self.folder / "golden.safetensors")
        return check_outputs(self.folder, self.manifest, self(golden[self.input]), golden)

    def picture(self, prediction: np.ndarray, size: Any = None, below: Any = None) -> np.ndarray:
        """Paint one row of `prediction`, uint8 [height, width, 3], resized to `size`."""
        how = self.manifest["picture"]
        if how["kind"] == "label":
            names = self.manifest["task"].get("labels") or range(len(how["colours"]))
            if below is None:
                below = np.zeros((*(size or self.size), 3), np.uint8)
            return photo.tagged(below, str(names[int(prediction)]), how["colours"][int(prediction)])
        size = size or prediction.shape[:2]
        if how["kind"] == "classes":
            colours = np.asarray(how["colours"], np.uint8)
            return colours[photo.resize(prediction.astype(np.int32), size, "nearest")]
        value = photo.resize(prediction.astype(np.float32), size, "bilinear")
        if how["kind"] == "vector":
            value = value / np.maximum(np.linalg.norm(value, axis=-1, keepdims=True), 1e-12)
            return np.round(127.5 * (np.clip(value, -1, 1) + 1)).astype(np.uint8)
        colours = np.asarray(how["colours"], np.uint8)
        share = (value - how["low"]) / (how["high"] - how["low"])
        index = np.clip(share * len(colours), 0, len(colours) - 1).astype(np.int32)
        return np.where(
            (share <= 0)[..., None], np.asarray(how["lowest"], np.uint8), colours[index]
        )


def words(manifest: Mapping[str, Any], prediction: np.ndarray) -> str:
    """What one row of `prediction` says, in words: the share of each class, or the range."""
    how, task = manifest["picture"]["kind"], manifest["task"]
    colours = manifest["picture"].get("colours", ())
    names = task.get("labels") or [f"class {i}" for i in range(len(colours))]
    if how == "label":
        return str(names[int(prediction)])
    if how == "classes":
        shares = np.bincount(prediction.ravel(), minlength=len(names)) / prediction.size
        most = [i for i in np.argsort(-shares, kind="stable")[:6] if shares[i] >= 0.005]
        return ", ".join(f"{names[i]} {100 * shares[i]:.0f} %" for i in most)
    if how == "range":
        return f"{prediction.min():.3g} to {prediction.max():.3g} ({task['unit']})"
    return str(task["unit"])


def filled(batch: np.ndarray) -> np.ndarray:
    """The batch with its last row repeated up to a power of two, for few compiled programs."""
    more = (1 << max(len(batch) - 1, 0).bit_length()) - len(batch)
    return np.concatenate([batch, np.repeat(batch[-1:], more, axis=0)])


def check_outputs(
    folder: Path,
    manifest: Mapping[str, Any],
    outputs: Mapping[str, np.ndarray],
    golden: Mapping[str, np.ndarray],
) -> float:
    """What `Predictor.self_check` says of outputs and the stored ones under the same names."""
    worst = 0.0
    for name, value in outputs.items():
        if value.dtype.kind == "f":
            scale = max(1.0, float(np.max(np.abs(golden[name]))))
            worst = max(worst, float(np.max(np.abs(value - golden[name]))) / scale)
    limits = manifest["golden"]
    tolerance = limits.get(jax.default_backend(), limits["other"])
    if not worst <= tolerance:
        raise ExportError(f"{folder} gives outputs {worst:.2g} off the stored ones.")
    return worst


def load_export(folder: str | Path) -> Predictor:
    """Verify an exported folder and make it callable.

    Checks, in this order: the manifest, its schema, every file's checksum, the JAX version.
    Raises ExportError with what is wrong and what to do.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    verify(folder, manifest)
    return Predictor(folder, manifest, program(folder / "model.stablehlo", manifest))


def verify(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ExportError where a file is not the one that was written, or JAX does not fit."""
    for name, expected in manifest["files"].items():
        if not (folder / name).is_file():
            raise ExportError(f"{folder} is incomplete: {name} is missing; export it again.")
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise ExportError(f"{folder / name} is damaged (wrong checksum); export it again.")
    written, running = manifest["versions"]["jax"], jax.__version__
    convention = manifest["versions"]["calling_convention"]
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    fits = oldest <= convention <= newest
    if not fits or _minor(running) < _minor(written):
        raise ExportError(
            f"{folder} was written by jax {written} and this is jax {running}: use jax {written} "
            "or one released up to six months later, or export it again."
        )


def program(file: Path, manifest: Mapping[str, Any]) -> export.Exported:
    """A stored program; raises ExportError where this JAX cannot read it."""
    try:
        return export.deserialize(bytearray(file.read_bytes()))
    except Exception as error:
        written = manifest["versions"]["jax"]
        raise ExportError(
            f"jax {jax.__version__} cannot read {file}, written by jax {written}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


def one_task(manifest: Mapping[str, Any]) -> None:
    """Fail for a manifest that is none of one task's path."""
    if "conditions" in manifest and "task" not in manifest:
        raise ExportError("This folder holds encoders: run its encode.py, or use load_encoders.")
    ((name, form),) = manifest["inputs"].items()
    _ = [manifest[key] for key in REQUIRED], INPUTS.index(name), form["shape"][2]


def read_manifest(folder: Path, check: Callable[[Any], Any] = one_task) -> dict[str, Any]:
    """The manifest of an exported folder; raises ExportError when it is none.

    check: fails for a manifest without the entries that the caller needs.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise ExportError(f"{folder} is not an exported folder: it has no manifest.json.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
        if schema == SCHEMA:
            _ = manifest["versions"]["jax"], manifest["versions"]["calling_convention"]
            check(manifest)
    except (ValueError, LookupError, TypeError) as error:
        raise ExportError(f"{path} is damaged ({error}); export it again.") from error
    if schema != SCHEMA:
        raise ExportError(f"{path} has schema {schema}, this program reads schema {SCHEMA}.")
    return manifest


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a safetensors file; raises ExportError when it is damaged."""
    data = path.read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        arrays = {}
        for name, entry in header.items():
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            if end > len(data):
                raise ValueError(f"{name} lies beyond the end of the file")
            flat = np.frombuffer(data[first:end], DTYPES[entry["dtype"]])
            arrays[name] = flat.reshape(entry["shape"])
        return arrays
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is not a readable safetensors file ({error}).") from error


def hearing() -> Any:
    """The module `sound`, which only exports of sound runs have beside this file."""
    return importlib.import_module(f"{__package__}.sound" if __package__ else "sound")


def predict_file(predictor: Predictor, file: str | Path, out: str | Path) -> dict[str, np.ndarray]:
    """Predict one file and paint it into `out`: a photo at its size, of a sound its spectrogram."""
    if predictor.input == "audio":
        batch = predictor.prepare([hearing().read(file, predictor.manifest["preprocess"])])
        below = hearing().spectrogram(batch[0])
    else:
        below = photo.read_image(file)
        batch = below[None]
    outputs = predictor(batch)
    photo.write_image(out, predictor.picture(outputs["prediction"][0], below.shape[:2], below))
    return outputs


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def main(arguments: list[str] | None = None) -> int:
    """The command of a copy that lies in an exported folder."""
    parser = argparse.ArgumentParser(description="Predict one file with the export beside me.")
    parser.add_argument("file", help="a PNG or JPEG file, or a sound, as the model reads")
    parser.add_argument("--out", default="picture.png", help="the picture to write")
    options = parser.parse_args(arguments)
    try:
        predictor = load_export(Path(__file__).resolve().parent)
        outputs = predict_file(predictor, options.file, options.out)
        print(f"{options.out}: {words(predictor.manifest, outputs['prediction'][0])}")
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {predictor.manifest['task']['name']} of {options.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
