"""What a manifest of an export may say: one table per format, checked as a whole before use.

Imports nothing of the package but `schema_check`: a copy of both travels in exports.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

if __package__:
    from moezoo import schema_check as sc
else:
    import schema_check as sc  # pyright: ignore[reportMissingImports]

SCHEMA = 1
WORDS = r"[a-z]+|\d+|[^\sa-z\d]"  # the only pattern of words; others could take for ever
WIDEST = 2**14  # pixels, frames or bands along one side
LARGEST = 2**28  # numbers in one array of one example
DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")

LINE = sc.text(4096)
SHAPE = sc.list_of(sc.either(sc.one_of("b"), sc.whole(1, LARGEST)), 1, 6)
SIDE = sc.whole(1, WIDEST)
COLOUR = sc.list_of(sc.whole(0, 255), 3, 3)
COLOURS = sc.list_of(COLOUR, 1, 2**16)
THREE = sc.list_of(sc.number(-1e6, 1e6), 3, 3)
POSITIVE = sc.list_of(sc.number(1e-6, 1e6), 3, 3)
# Wide tolerances would let every output pass for the stored one.
TOLERANCES = sc.table({"other": sc.number(0, 0.5)}, ("other",), others=sc.number(0, 0.5))


def sequence(*checks: sc.Check) -> sc.Check:
    """A list of just as many values, each with a check of its own."""

    def check(value: Any, place: str) -> None:
        sc.list_of(sc.anything, len(checks), len(checks))(value, place)
        for i, one in enumerate(checks):
            one(value[i], f"{place}[{i}]")

    return check


def whole_table(fields: Mapping[str, sc.Check]) -> sc.Check:
    """An object in which all of these are there, and perhaps others."""
    return sc.table(fields, tuple(fields))


def step(name: str, **fields: sc.Check) -> sc.Check:
    """One step of `preprocess`."""
    return whole_table({"step": sc.one_of(name), **fields})


SEEING = sequence(
    step("resize", height=SIDE, width=SIDE, mode=sc.one_of("bilinear", "nearest")),
    step("scale", factor=sc.number(1e-6, 1e6)),
    step("normalise", mean=THREE, std=POSITIVE),
)
HEARING = sequence(
    step("mono", how=sc.one_of("average", "first")),
    step("resample", rate=sc.whole(1_000, 768_000)),
    step("log_mel", bands=SIDE),
    step("pad", frames=SIDE, value=sc.one_of(0.0), longer=sc.one_of("cut")),
    step("normalise", mean=sc.number(-1e6, 1e6), std=sc.number(1e-6, 1e6)),
)


def _files(value: Any, place: str) -> None:
    sc.map_of(sc.text(64, "[0-9a-f]{64}"), 1, 10_000)(value, place)
    for name in value:
        sc.relative(name, f"a name in {place}")


COMMON: dict[str, sc.Check] = {
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
PICTURES: dict[str, sc.Check] = {
    "classes": whole_table({"colours": COLOURS}),
    "label": whole_table({"colours": COLOURS}),
    "vector": sc.anything,
    "range": whole_table(
        {
            "low": sc.number(-1e9, 1e9),
            "high": sc.number(-1e9, 1e9),
            "lowest": COLOUR,
            "colours": COLOURS,
        }
    ),
}


def _picture(value: Any, place: str) -> None:
    whole_table({"kind": sc.one_of(*PICTURES)})(value, place)
    PICTURES[value["kind"]](value, place)


TASK_FIELDS = COMMON | {
    "task": sc.table(
        {
            "name": sc.text(200),
            "unit": LINE,
            "labels": sc.list_of(sc.text(200), 1, 2**16),
            "ignore_label": sc.whole(0, 255),
        },
        ("name", "unit"),
    ),
    "inputs": sc.either(
        sc.table({"audio": INPUT}, ("audio",), others=sc.refused),
        sc.table({"image": INPUT}, ("image",), others=sc.refused),
    ),
    "preprocess": sc.either(HEARING, SEEING),
    "outputs": sc.table(
        dict.fromkeys(("logits", "prediction", "violations"), OUTPUT),
        ("logits", "prediction", "violations"),
        others=sc.refused,
    ),
    "picture": _picture,
}
TASK = sc.table(TASK_FIELDS | LOOSE, tuple(TASK_FIELDS))

CONDITION = whole_table(
    {
        "inputs": sc.list_of(sc.one_of("image", "text"), 1, 2),
        "program": sc.text(200, r"\w+\.stablehlo"),
        "weights": sc.map_of(sc.text(1000)),
        "outputs": sc.table({"whole": SHAPE, "text": SHAPE}, ("whole",), others=sc.refused),
    }
)
ENCODER_FIELDS = COMMON | {
    "image_size": sc.list_of(SIDE, 2, 2),
    "preprocess": SEEING,
    "text": whole_table(
        {
            "pattern": sc.one_of(WORDS),
            "words": sc.list_of(sc.text(200), 1, 10**6),
            "length": sc.whole(1, WIDEST),
            "pad": sc.whole(0, 10**6),
        }
    ),
    "temperature": sc.number(1e-6, 1e6),
    "conditions": sc.map_of(CONDITION, 1, 10_000),
}
ENCODERS = sc.table(ENCODER_FIELDS | LOOSE, tuple(ENCODER_FIELDS))


def one_task(manifest: Any) -> None:
    """Raise Unfit for a manifest that is none of one task's path."""
    _check_kind(manifest, "task", "conditions", "This folder holds encoders: run its encode.py")
    TASK(manifest, "")
    ((name, given),) = manifest["inputs"].items()
    _check_batch(given["shape"], f"inputs.{name}.shape", 3 if name == "audio" else 4)
    for output, about in manifest["outputs"].items():
        _check_batch(about["shape"], f"outputs.{output}.shape")
    size, steps = given["shape"][1:3], {s["step"]: s for s in manifest["preprocess"]}
    if name == "image":
        resize = steps.get("resize", {})
        made = [resize.get("height"), resize.get("width")]
        _check(given["shape"][3:] == [3], "inputs.image.shape has no 3 colours")
    else:
        made = [steps.get("pad", {}).get("frames"), steps.get("log_mel", {}).get("bands")]
    _check(made == size, f"preprocess makes {made} of an input, the program reads {size}")
    _check_picture(manifest)
    _check_listed(manifest, {"model.stablehlo"})


def encoders(manifest: Any) -> None:
    """Raise Unfit for a manifest that is none of encoders."""
    _check_kind(manifest, "conditions", "task", "This folder holds one task: run its predict.py")
    ENCODERS(manifest, "")
    resize = manifest["preprocess"][0]
    made, size = [resize["height"], resize["width"]], manifest["image_size"]
    _check(made == size, f"preprocess makes {made} of an image, the programs read {size}")
    text = manifest["text"]
    _check(text["pad"] < len(text["words"]), "text.pad is none of the words")
    for name, entry in manifest["conditions"].items():
        told = f"conditions.{sc.shown(name)}"
        _check(len(set(entry["inputs"])) == len(entry["inputs"]), f"{told}.inputs has one twice")
        _check(("text" in entry["outputs"]) == ("text" in entry["inputs"]), f"{told}.outputs")
        for output, shape in entry["outputs"].items():
            _check_batch(shape, f"{told}.outputs.{output}", 2 if output == "whole" else 3)
    _check_listed(manifest, {entry["program"] for entry in manifest["conditions"].values()})


def _check(fits: bool, sentence: str) -> None:
    if not fits:
        raise sc.Unfit(sentence)


def _check_kind(manifest: Any, own: str, other: str, sentence: str) -> None:
    if isinstance(manifest, dict) and other in manifest and own not in manifest:
        raise sc.Unfit(sentence)


def _check_batch(shape: list[Any], place: str, rank: int | None = None) -> None:
    """A shape is `b`, then whole numbers, not too many together."""
    fits = shape[0] == "b" and "b" not in shape[1:] and rank in (None, len(shape))
    _check(fits, f"{place} is {sc.shown(shape)}, which is no such shape")
    _check(math.prod(shape[1:]) <= LARGEST, f"{place} is {sc.shown(shape)}, which is too large")


def _check_picture(manifest: Mapping[str, Any]) -> None:
    """What is painted is there: a colour and a name for every class."""
    how, outputs = manifest["picture"], manifest["outputs"]
    shape, logits = outputs["prediction"]["shape"], outputs["logits"]["shape"]
    place = "outputs.prediction.shape"
    ranks = {"label": 1, "vector": 4}
    _check(len(shape) == ranks.get(how["kind"], 3), f"{place} is no {how['kind']}'s")
    if how["kind"] == "vector":
        _check(shape[3] == 3, f"{place} holds no vectors of 3")
    if how["kind"] == "range":
        _check(how["low"] < how["high"], "picture.low is not below picture.high")
    if how["kind"] in ("classes", "label"):
        dtype, count = outputs["prediction"]["dtype"], logits[-1]
        _check(dtype.startswith(("int", "uint")), "outputs.prediction.dtype is no class index's")
        labels = manifest["task"].get("labels", how["colours"])
        fits = len(how["colours"]) == len(labels) == count
        _check(fits, f"colours and labels are not {count}, as many as the program's classes")


def _check_listed(manifest: Mapping[str, Any], programs: set[str]) -> None:
    """Every file that is read has a checksum; without one nothing would be verified."""
    for name in sorted(programs | {"model.safetensors", "golden.safetensors"}):
        _check(name in manifest["files"], f"files has no checksum of {name}")
