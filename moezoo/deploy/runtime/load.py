"""Run an exported folder. Needs JAX, NumPy and flatbuffers; Pillow for pictures; not moezoo.

An export reads one kind of input, which its manifest names: `image`, `audio`, or a domain's own.
How a file becomes that input is known by a `Reader`: a module that lies beside this file in an
export, and that `moezoo.registry` names where moezoo is installed.

This file imports nothing of the package but what lies beside it, because a copy of it travels in
every export as `predict.py`:

    python predict.py photo.jpg --out picture.png
    python predict.py clip.wav --out picture.png

A folder from a stranger. Its `predict.py` is the stranger's program: run your own copy of this one
on it (`load_export(folder)`, `moezoo predict FOLDER photo.jpg`). That reads plain data and
one program of arithmetic, which can call nothing, write nothing, connect to nothing and loop only
up to a limit, and is refused before it is compiled where it asks for anything else; its memory is
bounded (`memory=`). What it can: give wrong answers, since checksums and stored outputs are the
stranger's, too, and compute for long, since nothing but its end stops a compiled program: the
commands give up after `--seconds`, a service should run it in a process that it can end.
"""

from __future__ import annotations

import argparse
import html
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import drawing, forms, programs
    from moezoo.deploy.runtime import folder as files
else:  # in an export, even where Python leaves a script's own folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.dont_write_bytecode = True  # the folder stays as it was written
    import drawing  # pyright: ignore[reportMissingImports]
    import folder as files  # pyright: ignore[reportMissingImports]
    import forms  # pyright: ignore[reportMissingImports]
    import programs  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]

ExportError = forms.ExportError
read_tensors = files.read_tensors
words = drawing.words
SCHEMA = forms.SCHEMA
GIVE_UP = 600.0  # seconds
# Files of readers in a folder, where they are not called as the input is: part of the format, which
# has had these names from the start.
READERS = {"image": "photo", "audio": "sound"}


class Reader(Protocol):
    """A module that makes a model's input of files: what a domain gives its exports.

    It runs in two places: in a package where moezoo is installed, and as a copy in an export. Its
    imports tell them apart by `__package__`, as those of this file do, so the original lies in a
    package, a folder with an `__init__.py`, also where that stands beside a configuration file.

    STEPS: the form of the manifest's `preprocess`, checked before anything else is asked.
    """

    STEPS: sc.CheckValue

    def fits(self, shape: Sequence[Any], steps: Any, place: str) -> None:
        """Raise FormatFault where the steps lead to another shape of an example than this."""
        ...

    def read(self, path: str | Path, steps: Any) -> Any:
        """One file as an example that `prepare` takes; ExportError where it is none."""
        ...

    def prepare(self, given: Any, shape: Sequence[int], steps: Any) -> np.ndarray:
        """Examples as the program reads them, [B, *shape]; ExportError for any other form."""
        ...

    def backdrop(self, example: Any, prepared: np.ndarray) -> np.ndarray:
        """The picture, uint8 [height, width, 3], that an example's prediction is shown on."""
        ...


def reader_of(name: str) -> Reader:
    """The reader of an input; FormatFault where there is none.

    Where moezoo is installed it is moezoo's own, never one of the folder: that is a stranger's.
    """
    if __package__:
        from moezoo import registry

        if name not in registry.READERS:
            raise forms.OtherProgram(
                f"reads inputs called {name}, which only the program of its author knows: if you "
                f"trust who made it, run predict.py in that folder"
            )
        return registry.reader(name)
    own, file = Path(__file__).resolve().parent, READERS.get(name, name)
    if not (own / f"{file}.py").is_file():
        raise sc.FormatFault(f"inputs.{name} needs {file}.py, which is not there")
    module = importlib.import_module(file)
    # A name such as `json` or `folder` leads to a module that is no reader, or lies elsewhere.
    found = getattr(module, "__file__", None)
    if found is None or Path(found).resolve().parent != own or lacking(module):
        raise sc.FormatFault(f"inputs.{name} needs a reader, which {file}.py is not")
    return module  # type: ignore[return-value]


def lacking(module: Any) -> list[str]:
    """What a module has not, and a reader has."""
    return [
        name
        for name in ("STEPS", "fits", "read", "prepare", "backdrop")
        if not hasattr(module, name)
    ]


class Predictor:
    """An export that is ready to be called; thread-safe, holds no state but the weights."""

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], memory: int | None = None
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        ((self.input, form),) = manifest["inputs"].items()
        self.reader, self.shape = reader_of(self.input), tuple(form["shape"][1:])
        weights = read_tensors(folder / "model.safetensors")
        outputs = {k: (o["shape"], o["dtype"]) for k, o in manifest["outputs"].items()}
        given = (form["shape"], form["dtype"])
        found = checked(folder / "model.stablehlo", manifest, weights, [given], outputs)
        self._weights, self._call = jax.device_put(weights), programs.Program(found, memory)

    def __call__(self, given: Any) -> dict[str, np.ndarray]:
        """Predict a batch.

        given: examples as the input's reader takes them: of `image` uint8 [B, height, width, 3] of
        any size (RGB photos, resized and normalised here), of `audio` B mono waveforms float32
        [samples] of the manifest's rate; or float32 that is already what the manifest's
        `preprocess` leads to, [B, H, W, 3] or [B, frames, bands].
        Returns the manifest's `outputs`, NumPy, B rows each. The batch is padded to a power of
        two, so that few programs are compiled. Raises ExportError for any other shape or type.
        """
        batch = self.prepare(given)
        outputs = self._call(self._weights, filled(batch))
        how = self.manifest["picture"]
        if how["kind"] in forms.INDEXED:
            count = len(how[forms.INDEXED[how["kind"]]])
            files.check_classes(outputs["prediction"], count)
        return {name: value[: len(batch)] for name, value in outputs.items()}

    def warmup(self, largest: int = 32) -> list[int]:
        """Compile the programs of all batches up to `largest` rows, so that no first call waits.

        Returns the sizes that there are programs for; every batch is filled up to one of them.
        """
        sizes = [1 << power for power in range(max(largest - 1, 0).bit_length() + 1)]
        for size in sizes:
            self._call(self._weights, np.zeros((size, *self.shape), np.float32))
        return sizes

    def prepare(self, given: Any) -> np.ndarray:
        """The network's input: the manifest's `preprocess` steps, float32."""
        return self.reader.prepare(given, self.shape, self.manifest["preprocess"])

    def self_check(self) -> float:
        """Largest difference from the stored outputs for the stored inputs, of every output.

        Of numbers relative to the largest stored one where that is above 1, of classes the share
        that differs. Raises ExportError when it exceeds the manifest's tolerance for this
        platform, and for numbers that are not finite.
        """
        golden = files.stored_inputs(self.folder, {self.input: None})
        outputs = self(golden[self.input])
        return files.check_outputs(self.folder, self.manifest, outputs, golden)

    def facts(self) -> dict[str, str]:
        """What this export is, in words: task, source, kind of path, size, costs."""
        task, about = self.manifest["task"], self.manifest["certificate"]
        cost = about.get("cost", {})
        rows = {
            "task": f"{task['name']} ({task['unit']})" if task.get("unit") else task["name"],
            "from": self.manifest["source"],
            "training data": self.manifest["training_data"],
            "reads": f"{self.input} {' x '.join(map(str, self.shape))}",
            "path": str(about.get("kind", "")),
        }
        if "parameters" in cost:
            rows["parameters"] = f"{cost['parameters']:,}"
        return rows | {"licence": str(self.manifest["licence"])}

    def __repr__(self) -> str:
        return f"<export of {self.manifest['task']['name']} from {self.manifest['source']}>"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in self.facts().items())
        return f"<table>{''.join(rows)}</table>"

    def picture(self, prediction: np.ndarray, size: Any = None, below: Any = None) -> np.ndarray:
        """Paint one row of `prediction`, uint8 [height, width, 3], resized to `size`."""
        return drawing.paint(self.manifest, prediction, size, below)


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
    manifest = files.read_manifest(folder, lambda found: forms.one_task(found, reader_of))
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
    except sc.FormatFault as error:
        raise ExportError(f"{file} does not fit its folder: {error}; export it again.") from error
    return found


def predict_file(predictor: Predictor, file: str | Path, out: str | Path) -> dict[str, np.ndarray]:
    """Predict one file and paint it into `out`: a photo at its size, of a clip its spectrogram."""
    if Path(out).resolve() == Path(file).resolve():
        raise ExportError(f"The picture would replace {file}, which is to be predicted.")
    reader, steps = predictor.reader, predictor.manifest["preprocess"]
    example = reader.read(file, steps)
    batch = predictor.prepare([example])
    below = reader.backdrop(example, batch[0])
    outputs = predictor(batch)
    painted = predictor.picture(outputs["prediction"][0], below.shape[:2], below)
    drawing.write_image(out, painted)
    return outputs


def main(arguments: list[str] | None = None) -> int:
    """The command of a copy that lies in an exported folder."""
    parser = argparse.ArgumentParser(description="Predict one file with this export.")
    parser.add_argument("file", help="a file as the model reads: a PNG or JPEG, a recording")
    parser.add_argument("--out", default="picture.png", help="the picture to write")
    parser.add_argument(
        "--seconds", type=float, default=GIVE_UP, help="give up after this many seconds"
    )
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
