"""Run an exported folder. Needs JAX, NumPy and flatbuffers; Pillow for pictures; not moezoo.

This file imports nothing of the package but what lies beside it, because a copy of it travels in
every export as `predict.py`:

    python predict.py photo.jpg --out picture.png
    python predict.py clip.wav --out picture.png

A folder from a stranger. Its `predict.py` is the stranger's program: run your own copy of this one
on it (`load_export(folder)`, `python tools/predict.py FOLDER photo.jpg`). That reads plain data and
one program of arithmetic, which can call nothing, write nothing, connect to nothing and loop only
up to a limit, and is refused before it is compiled where it asks for anything else; its memory is
bounded (`memory=`). What it can: give wrong answers, since checksums and stored outputs are the
stranger's, too, and compute for long, since nothing but its end stops a compiled program: the
commands give up after `--seconds`, a service should run it in a process that it can end.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import folder as files
    from moezoo.deploy.runtime import forms, photo, programs
else:  # in an export, even where Python leaves a script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.dont_write_bytecode = True  # the folder stays as it was written
    import folder as files  # pyright: ignore[reportMissingImports]
    import forms  # pyright: ignore[reportMissingImports]
    import photo  # pyright: ignore[reportMissingImports]
    import programs  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]

ExportError = photo.ExportError
read_tensors = files.read_tensors
SCHEMA = forms.SCHEMA
GIVE_UP = 600.0  # seconds


class Predictor:
    """An export that is ready to be called; thread-safe, holds no state but the weights."""

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], memory: int | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        ((self.input, form),) = manifest["inputs"].items()
        self.size: tuple[int, int] = tuple(form["shape"][1:3])
        weights = read_tensors(folder / "model.safetensors")
        outputs = {k: (o["shape"], o["dtype"]) for k, o in manifest["outputs"].items()}
        given = (form["shape"], form["dtype"])
        found = checked(folder / "model.stablehlo", manifest, weights, [given], outputs)
        self._weights, self._call = jax.device_put(weights), programs.Program(found, memory)

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
        how = self.manifest["picture"]
        if how["kind"] in ("classes", "label"):
            files.check_classes(outputs["prediction"], len(how["colours"]))
        return {name: value[: len(batch)] for name, value in outputs.items()}

    def prepare(self, given: Any) -> np.ndarray:
        """The network's input: the manifest's `preprocess` steps, float32."""
        if self.input == "audio":
            return hearing().prepare(given, self.size, self.manifest["preprocess"])
        return photo.prepare(np.asarray(given), self.size, self.manifest["preprocess"])

    def self_check(self) -> float:
        """Largest difference from the stored outputs for the stored inputs, of every output.

        Of numbers relative to the largest stored one where that is above 1, of classes the share
        that differs. Raises ExportError when it exceeds the manifest's tolerance for this
        platform, and for numbers that are not finite.
        """
        golden = files.stored_inputs(self.folder, {self.input: None})
        outputs = self(golden[self.input])
        return files.check_outputs(self.folder, self.manifest, outputs, golden)

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


def load_export(folder: str | Path, memory: int | None = None) -> Predictor:
    """Verify an exported folder and make it callable.

    Checks, in this order: the manifest, every file's checksum, the JAX version, the program, its
    arrays. What a stranger's folder can and cannot do, the first lines of this file say.
    memory: the most bytes that a call may take; None: what suits the arrays and this machine.
    Raises ExportError with what is wrong and what to do.
    """
    folder = Path(folder)
    manifest = files.read_manifest(folder, forms.one_task)
    files.verify(folder, manifest)
    return Predictor(folder, manifest, memory)


def checked(
    file: Path,
    manifest: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    inputs: Sequence[programs.Array],
    outputs: Mapping[str, programs.Array],
) -> Any:
    """A stored program that may be compiled and has these arrays; ExportError otherwise."""
    found = programs.read(file, manifest["versions"]["jax"])
    try:
        programs.check_arrays(found, weights, inputs, outputs)
    except sc.Unfit as error:
        raise ExportError(f"{file} does not fit its folder: {error}; export it again.") from error
    return found


def hearing() -> Any:
    """The module `sound`, which only exports of sound runs have beside this file."""
    return importlib.import_module("moezoo.domains.audio.runtime" if __package__ else "sound")


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


def main(arguments: list[str] | None = None) -> int:
    """The command of a copy that lies in an exported folder."""
    parser = argparse.ArgumentParser(description="Predict one file with the export beside me.")
    parser.add_argument("file", help="a PNG or JPEG file, or a sound, as the model reads")
    parser.add_argument("--out", default="picture.png", help="the picture to write")
    parser.add_argument("--seconds", type=float, default=GIVE_UP, help="give up after so many")
    options = parser.parse_args(arguments)
    try:
        with programs.at_most(options.seconds):
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
