"""What a manifest of an export may say, checked as a whole before use; `ExportError`.

This is the part of the format that all exports share. What the steps of `preprocess` mean is said
by the reader of the export's input (`STEPS` and `fits` of that module, see `load.Reader`). Imports
nothing of the package but `schema_check`: a copy of both travels in exports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

if __package__:
    from moezoo import schema_check as sc
else:
    import schema_check as sc  # pyright: ignore[reportMissingImports]

SCHEMA = 1
OTHERS = {"encoders": "encode.py"}  # kinds of folder that hold no task's path, and their programs
WIDEST = 2**14  # pixels, frames or bands along one side
LARGEST = 2**28  # numbers in one array of one example
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")

LINE = sc.line()
SHAPE = sc.list_of(sc.either(sc.one_of("b"), sc.whole(1, LARGEST)), 1, 6)
SIDE = sc.whole(1, WIDEST)
COLOUR = sc.list_of(sc.whole(0, 255), 3, 3)
COLOURS = sc.list_of(COLOUR, 1, 2**16)
# Wide tolerances would let every output pass for the stored one.
TOLERANCES = sc.table({"other": sc.number(0, 0.5)}, ("other",), others=sc.number(0, 0.5))


class ExportError(Exception):
    """An exported folder, or a file given to it, cannot be used: one sentence that says why."""


class OtherProgram(sc.FormatFault):
    """A sound folder that another program reads; a sentence whose subject is the folder."""


def sequence(*checks: sc.CheckValue) -> sc.CheckValue:
    """A list of just as many values, each with a check of its own."""

    def check(value: Any, place: str) -> None:
        sc.list_of(sc.anything, len(checks), len(checks))(value, place)
        for i, one in enumerate(checks):
            one(value[i], f"{place}[{i}]")

    return check


def whole_table(fields: Mapping[str, sc.CheckValue]) -> sc.CheckValue:
    """An object in which all of these are there, and perhaps others."""
    return sc.table(fields, tuple(fields))


def step(name: str, **fields: sc.CheckValue) -> sc.CheckValue:
    """One step of `preprocess`."""
    return whole_table({"step": sc.one_of(name), **fields})


def _files(value: Any, place: str) -> None:
    sc.map_of(sc.text(64, "[0-9a-f]{64}"), 1, 10_000)(value, place)
    for name in value:
        sc.relative(name, f"a name in {place}")


COMMON: dict[str, sc.CheckValue] = {
    "schema": sc.one_of(SCHEMA),
    "files": _files,
    "golden": TOLERANCES,
    "versions": whole_table(
        {"jax": sc.text(40, r"\d{1,4}\.\d{1,4}[\w.+-]*"), "calling_convention": sc.whole(0, 10**6)}
    ),
}
LOOSE = {"source": LINE, "training_data": LINE, "licence": LINE}
INPUT = whole_table({"dtype": sc.one_of("float32"), "shape": SHAPE})
OUTPUT = whole_table({"dtype": sc.one_of(*DTYPES), "shape": SHAPE})


def _one_input(value: Any, place: str) -> None:
    """One array under the name of its kind, which is also the name of a Python module."""
    sc.map_of(INPUT, 1, 1)(value, place)
    for name in value:
        sc.text(40, r"[a-z]\w*")(name, f"the name in {place}")


PICTURES: dict[str, sc.CheckValue] = {
    "classes": whole_table({"colours": COLOURS}),
    "label": whole_table({"colours": COLOURS}),
    "vector": sc.anything,
    "number": sc.anything,
    "sentence": whole_table(
        {
            "words": sc.list_of(sc.line(200), 1, 2**20),
            "end": sc.whole(0, 2**20),
            "marks": sc.whole(0, 100),
        }
    ),
    "range": whole_table(
        {
            "low": sc.number(-1e9, 1e9),
            "high": sc.number(-1e9, 1e9),
            "lowest": COLOUR,
            "colours": COLOURS,
        }
    ),
}

# Axes of a batch of predictions: a class, a few numbers or words of an example, or a map of it.
RANKS = {"classes": (3,), "label": (1,), "vector": (4,), "number": (1, 2), "range": (3,)}
RANKS |= {"sentence": (2,)}
# Pictures whose predictions are indices, and what there is one of for each index.
INDEXED = {"classes": "colours", "label": "colours", "sentence": "words"}


def _picture(value: Any, place: str) -> None:
    whole_table({"kind": sc.one_of(*PICTURES)})(value, place)
    PICTURES[value["kind"]](value, place)


TASK_FIELDS = COMMON | {
    "task": sc.table(
        {
            "name": sc.line(200),
            "unit": LINE,
            "labels": sc.list_of(sc.line(200), 1, 2**16),
            "ignore_label": sc.whole(0, 255),
        },
        ("name", "unit"),
    ),
    "inputs": _one_input,
    "preprocess": sc.list_of(sc.anything, 0, 100),
    "outputs": sc.table(
        dict.fromkeys(("logits", "prediction", "violations"), OUTPUT),
        ("logits", "prediction", "violations"),
        others=sc.refused,
    ),
    "picture": _picture,
}
TASK = sc.table(TASK_FIELDS | LOOSE, tuple(TASK_FIELDS))


def one_task(manifest: Any, reader_of: Callable[[str], Any]) -> None:
    """Raise FormatFault for a manifest that is none of one task's path.

    reader_of: the `load.Reader` of an input by its name; raises FormatFault where there is none.
    """
    kind = manifest.get("kind") if isinstance(manifest, dict) else None
    if isinstance(kind, str) and kind in OTHERS:
        raise OtherProgram(f"holds {kind}, not one task: run {OTHERS[kind]} in that folder")
    need(kind is None, f"kind is {sc.shown(kind)}, which is no kind of export")
    TASK(manifest, "")
    ((name, given),) = manifest["inputs"].items()
    reader = reader_of(name)
    check_batch(given["shape"], f"inputs.{name}.shape")
    reader.STEPS(manifest["preprocess"], "preprocess")
    for output, about in manifest["outputs"].items():
        check_batch(about["shape"], f"outputs.{output}.shape")
    reader.fits(given["shape"][1:], manifest["preprocess"], f"inputs.{name}.shape")
    _check_picture(manifest)
    check_listed(manifest, {"model.stablehlo"})


def need(fits: bool, sentence: str) -> None:
    """Raise FormatFault with this sentence unless it fits."""
    if not fits:
        raise sc.FormatFault(sentence)


def check_batch(shape: list[Any], place: str, rank: int | None = None) -> None:
    """A shape is `b`, then whole numbers, not too many together."""
    fits = shape[0] == "b" and "b" not in shape[1:] and rank in (None, len(shape))
    need(fits, f"{place} is {sc.shown(shape)}, which is no such shape")
    need(math.prod(shape[1:]) <= LARGEST, f"{place} is {sc.shown(shape)}, which is too large")


def _check_picture(manifest: Mapping[str, Any]) -> None:
    """What is painted is there: a colour and a name for every class."""
    how, outputs = manifest["picture"], manifest["outputs"]
    shape, logits = outputs["prediction"]["shape"], outputs["logits"]["shape"]
    place = "outputs.prediction.shape"
    need(len(shape) in RANKS[how["kind"]], f"{place} is no {how['kind']}'s")
    if how["kind"] == "vector":
        need(shape[3] == 3, f"{place} holds no vectors of 3")
    if how["kind"] == "range":
        need(how["low"] < how["high"], "picture.low is not below picture.high")
    if how["kind"] in INDEXED:
        dtype, count, name = outputs["prediction"]["dtype"], logits[-1], INDEXED[how["kind"]]
        need(dtype.startswith(("int", "uint")), "outputs.prediction.dtype is no class index's")
        labels = manifest["task"].get("labels", how[name])
        fits = len(how[name]) == len(labels) == count
        need(fits, f"{name} and labels are not {count}, as many as the program's classes")


def check_listed(manifest: Mapping[str, Any], programs: set[str]) -> None:
    """Every file that is read has a checksum; without one nothing would be verified."""
    for name in sorted(programs | {"model.safetensors", "golden.safetensors"}):
        need(name in manifest["files"], f"files has no checksum of {name}")
