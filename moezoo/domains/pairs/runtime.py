"""Run an exported folder of encoders: images and texts to features, and which belong together.

Like `load.py`, this file imports nothing from the package except files beside it: a copy of it
is in every such folder.

    python encode.py photo.jpg "a bedroom with two beds" "an office with a desk"
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import folder as files
    from moezoo.deploy.runtime import forms, load, programs
    from moezoo.domains.images import runtime as photo
else:  # in an export, even if Python leaves out a script's own folder
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.dont_write_bytecode = True  # the folder stays as it was written
    import folder as files  # pyright: ignore[reportMissingImports]
    import forms  # pyright: ignore[reportMissingImports]
    import photo  # pyright: ignore[reportMissingImports]
    import predict as load  # pyright: ignore[reportMissingImports]
    import programs  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]

ExportError = forms.ExportError
WORDS = r"[a-z]+|\d+|[^\sa-z\d]"  # the only allowed pattern of words; others could take forever
CONDITION = forms.whole_table(
    {
        "inputs": sc.list_of(sc.one_of("image", "text"), 1, 2),
        "program": sc.text(200, r"\w+\.stablehlo"),
        "weights": sc.map_of(sc.text(1000)),
        "outputs": sc.table(
            {"whole": forms.SHAPE, "text": forms.SHAPE}, ("whole",), others=sc.refused
        ),
    }
)
FIELDS = forms.COMMON | {
    "image_size": sc.list_of(forms.SIDE, 2, 2),
    "preprocess": photo.STEPS,
    "text": forms.whole_table(
        {
            "pattern": sc.one_of(WORDS),
            "words": sc.list_of(sc.line(200), 1, 10**6),
            "length": sc.whole(1, forms.WIDEST),
            "pad": sc.whole(0, 10**6),
        }
    ),
    "temperature": sc.number(1e-6, 1e6),
    "conditions": sc.map_of(CONDITION, 1, 10_000),
}
FORM = sc.table(FIELDS | forms.LOOSE, tuple(FIELDS))


def check(manifest: Any) -> None:
    """Raise FormatFault if a manifest is not one of encoders."""
    if isinstance(manifest, dict) and "task" in manifest and "conditions" not in manifest:
        raise forms.OtherProgram("holds one task, not encoders: run predict.py in that folder")
    FORM(manifest, "")
    resize = manifest["preprocess"][0]
    made, size = [resize["height"], resize["width"]], manifest["image_size"]
    forms.need(made == size, f"preprocess makes {made} of an image, the programs read {size}")
    text = manifest["text"]
    forms.need(text["pad"] < len(text["words"]), "text.pad is none of the words")
    for name, entry in manifest["conditions"].items():
        where, inputs = f"conditions.{sc.shown(name)}", entry["inputs"]
        forms.need(len(set(inputs)) == len(inputs), f"{where}.inputs has one twice")
        forms.need(("text" in entry["outputs"]) == ("text" in inputs), f"{where}.outputs")
        for output, shape in entry["outputs"].items():
            forms.check_batch(shape, f"{where}.outputs.{output}", 2 if output == "whole" else 3)
    forms.check_listed(manifest, {entry["program"] for entry in manifest["conditions"].values()})


class Encoders:
    """Encoders of several conditions that share their weights; `conditions` are their names."""

    def __init__(
        self, folder: Path, manifest: Mapping[str, Any], memory: int | None = None
    ) -> None:
        self.folder, self.manifest = folder, manifest
        arrays = load.read_tensors(folder / "model.safetensors")
        entries = manifest["conditions"]
        weights = {name: _weights(arrays, name, entry) for name, entry in entries.items()}
        found = {name: self._program(entry, weights[name]) for name, entry in entries.items()}
        made = {
            entry["program"]: programs.Program(found[name], memory)
            for name, entry in entries.items()
        }
        stored = jax.device_put(arrays)
        self._calls = {
            name: (made[entry["program"]], {k: stored[v] for k, v in entry["weights"].items()})
            for name, entry in entries.items()
        }

    def _program(self, entry: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Any:
        """The program of a condition: it takes its inputs and weights and gives its outputs."""
        given = {
            "image": (["b", *self.manifest["image_size"], 3], "float32"),
            "text": (["b", self.manifest["text"]["length"]], "int32"),
        }
        outputs = {name: (shape, "float32") for name, shape in entry["outputs"].items()}
        inputs = [given[name] for name in entry["inputs"]]
        return load.checked(self.folder / entry["program"], self.manifest, weights, inputs, outputs)

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that can be asked for: `task|input` and `task|target`."""
        return tuple(self._calls)

    def __call__(
        self, condition: str, image: Any = None, text: Any = None
    ) -> dict[str, np.ndarray]:
        """Features of a batch: `whole` float32 [B, D], and for texts `text` [B, L, D].

        image: uint8 photos [B, height, width, 3] of any size, or float32 as `preprocess` leaves
        them. text: B strings, or token ids int32 [B, L]. The manifest says which of them each
        condition needs. Raises ExportError for other inputs and for words the model does not know.
        """
        entry = self._entry(condition)
        given = {"image": image, "text": text}
        named = [name for name, value in given.items() if value is not None]
        if named != list(entry["inputs"]):
            wanted, got = " and ".join(entry["inputs"]), " and ".join(named) or "nothing"
            raise ExportError(f"{condition} encodes {wanted}, but {got} was given.")
        batch = {name: self.prepare(name, given[name]) for name in named}
        rows = {len(value) for value in batch.values()}
        if len(rows) != 1:
            raise ExportError(f"A batch needs equally many images and texts, not {rows}.")
        (count,) = rows
        filled = [load.filled(batch[name]) for name in named]
        call, weights = self._calls[condition]
        return {name: value[:count] for name, value in call(weights, *filled).items()}

    def prepare(self, name: str, given: Any) -> np.ndarray:
        """What the programs read: normalised images float32, or token ids int32 [B, L]."""
        if name == "image":
            shape = (*self.manifest["image_size"], 3)
            return photo.prepare(given, shape, self.manifest["preprocess"])
        if isinstance(given, str) or not len(given):
            raise ExportError("Give texts as a list of at least one string.")
        if isinstance(given[0], str):
            return np.stack([self._tokens(text) for text in given])
        ids, length = np.asarray(given), self.manifest["text"]["length"]
        if ids.dtype != np.int32 or ids.shape[1:] != (length,):
            raise ExportError(f"Token ids must be int32 [B, {length}].")
        return ids

    def _tokens(self, text: str) -> np.ndarray:
        about = self.manifest["text"]
        words = re.findall(about["pattern"], text.lower())
        unknown = [word for word in words if word not in about["words"]]
        if not words:
            raise ExportError(f"There is no word in the text {text!r}.")
        if unknown:
            raise ExportError(
                f"The word {unknown[0]!r} of {text!r} is none of the {len(about['words'])} that "
                "the model learned: the manifest lists them."
            )
        if len(words) > about["length"]:
            raise ExportError(f"{text!r} has {len(words)} words; {about['length']} have room.")
        row = np.full(about["length"], about["pad"], np.int32)
        row[: len(words)] = [about["words"].index(word) for word in words]
        return row

    def rank(self, images: Any, texts: Any, task: str = "retrieval") -> np.ndarray:
        """Cosine similarities over the learned temperature, float32 [images, texts]."""
        entries = self.manifest["conditions"]
        known = [
            name.removesuffix("|input")
            for name, entry in entries.items()
            if entry["inputs"] == ["image"] and name.replace("|input", "|target") in entries
        ]
        if task not in known:
            said = f"use {' or '.join(known)}" if known else "no task here does"
            raise ExportError(f"Task {task!r} does not compare images with texts: {said}.")
        image_BD = self(f"{task}|input", image=images)["whole"]
        text_CD = self(f"{task}|target", text=texts)["whole"]
        return _unit(image_BD) @ _unit(text_CD).T / np.float32(self.manifest["temperature"])

    def self_check(self) -> float:
        """Like `load.Predictor.self_check`, over all conditions."""
        entries = self.manifest["conditions"].values()
        needed = {name: None for entry in entries for name in entry["inputs"]}
        golden = files.stored_inputs(self.folder, needed)
        outputs = {
            f"{name}:{key}": value
            for name, entry in self.manifest["conditions"].items()
            for key, value in self(name, **{i: golden[i] for i in entry["inputs"]}).items()
        }
        return files.check_outputs(self.folder, self.manifest, outputs, golden)

    def _entry(self, condition: str) -> Mapping[str, Any]:
        entries = self.manifest["conditions"]
        if condition not in entries:
            raise ExportError(f"There is no condition {condition}; use {', '.join(entries)}.")
        return entries[condition]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.sum(x**2, axis=-1, keepdims=True) + np.float32(1e-6))


def _weights(
    arrays: Mapping[str, np.ndarray], condition: str, entry: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of a condition under the names of its program."""
    missing = [name for name in entry["weights"].values() if name not in arrays]
    if missing:
        raise ExportError(f"{condition} needs the weights {missing[0]!r}, which are missing.")
    return {key: arrays[name] for key, name in entry["weights"].items()}


def load_encoders(folder: str | Path, memory: int | None = None) -> Encoders:
    """Verify a folder of encoders and make them callable; see `load_export`."""
    folder = Path(folder)
    manifest = files.read_manifest(folder, check)
    files.verify(folder, manifest)
    return Encoders(folder, manifest, memory)


def ranking(encoders: Encoders, file: str | Path, texts: Sequence[str], task: str) -> list[str]:
    """The texts for an image file, best first, with their shares of a softmax in percent."""
    logits = encoders.rank(photo.read(file)[None], list(texts), task)[0].astype(np.float64)
    share = np.exp(logits - logits.max())
    share = 100 * share / share.sum()
    return [f"{share[i]:5.1f} %  {texts[i]}" for i in np.argsort(-share)]


def main(arguments: list[str] | None = None) -> int:
    """The command of a copy in an exported folder."""
    parser = argparse.ArgumentParser(description="Which of several texts matches an image best.")
    parser.add_argument("image", help="a PNG or JPEG file of any size")
    parser.add_argument("text", nargs="+", help="texts in words that the model learned")
    parser.add_argument("--task", default="retrieval", help="the task to use")
    parser.add_argument(
        "--seconds", type=float, default=load.GIVE_UP, help="give up after this many seconds"
    )
    options = parser.parse_args(arguments)
    try:
        with programs.at_most(options.seconds):
            encoders = load_encoders(Path(__file__).resolve().parent)
            lines = ranking(encoders, options.image, options.text, options.task)
        print("\n".join(lines))
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
