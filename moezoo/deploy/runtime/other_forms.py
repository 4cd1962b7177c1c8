"""Files of a path for other runtimes, in an exported folder: are they what the manifest says?

Where ONNX Runtime and LiteRT are installed they compute the stored examples again. A copy of this
file travels in every export, beside `verify.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import folder as files
    from moezoo.deploy.runtime.forms import need
else:
    import folder as files  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]
    from forms import need  # pyright: ignore[reportMissingImports]

OUTPUTS = ("logits", "prediction", "violations")
OFF = 1e-4  # of numbers, relative to the largest; another runtime adds in another order
OTHERS = 1e-3  # of classes and counts, the share that may differ: ties fall otherwise
SAID = {"largest_difference": sc.number(0, 1)}


class OtherForm(NamedTuple):
    """One of them.

    file: its name.   facts: the form of what a manifest says.   run: from a file and the input's
    name to a function from one example to its outputs by name; raises ImportError where the runtime
    is not installed. None where nothing but JAX reads it.   begins: what stands in the file, and
    where.   any_batch: whether it takes any number of examples, else one.
    """

    file: str
    facts: sc.CheckValue
    run: Callable[[Path, str], Callable[[np.ndarray], Mapping[str, np.ndarray]]] | None
    begins: tuple[int, bytes] = (0, b"")
    any_batch: bool = False


def _onnx(file: Path, name: str) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    run = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in run.get_outputs()]

    def call(given: np.ndarray) -> Mapping[str, np.ndarray]:
        return {k: np.asarray(v) for k, v in zip(names, run.run(None, {name: given}), strict=True)}

    return call


def _litert(file: Path, name: str) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    from ai_edge_litert import interpreter  # pyright: ignore

    run = interpreter.Interpreter(model_path=str(file)).get_signature_runner()

    def call(given: np.ndarray) -> Mapping[str, np.ndarray]:
        return {key: np.asarray(value) for key, value in run(**{name: given}).items()}

    return call


FORMS = {
    "onnx": OtherForm(
        "model.onnx",
        sc.table(
            {**SAID, "opset": sc.whole(1), "nodes": sc.whole(), "checked_with": sc.line(200)},
            ("largest_difference", "opset"),
            others=sc.refused,
        ),
        _onnx,
        any_batch=True,
    ),
    "litert": OtherForm(
        "model.tflite",
        sc.table({**SAID, "batch": sc.whole(1)}, ("largest_difference",), others=sc.refused),
        _litert,
        (4, b"TFL3"),
    ),
    "stablehlo": OtherForm(
        "model.batch1.stablehlo",
        sc.table(
            {**SAID, "batch": sc.whole(1), "version": sc.line(40)},
            ("largest_difference", "version"),
            others=sc.refused,
        ),
        None,
        (0, b"ML\xefR"),
    ),
}


def check(
    folder: Path, manifest: Mapping[str, Any], wanted: Mapping[str, np.ndarray]
) -> str | None:
    """What was found right, in words; raises FormatFault for what is not.

    wanted: the stored inputs, under the input's name, and outputs.
    """
    stated = manifest.get("formats", {})
    sc.map_of(sc.anything)(stated, "formats")
    for name in stated:
        need(name in FORMS, f"formats has {sc.shown(name)}, which is none of {', '.join(FORMS)}")
    for name, form in FORMS.items():
        there = form.file in manifest["files"]
        need(there == (name in stated), f"formats and files do not agree about {form.file}")
    told = [_one(folder, FORMS[name], facts, name, wanted) for name, facts in stated.items()]
    return ", ".join(told) or None


def _one(
    folder: Path, form: OtherForm, facts: Any, name: str, wanted: Mapping[str, np.ndarray]
) -> str:
    form.facts(facts, f"formats.{name}")
    at, mark = form.begins
    with open(folder / form.file, "rb") as file:
        start = file.read(at + len(mark))
    need(start[at:] == mark, f"{form.file} is no file of its kind")
    if form.run is None:
        return f"{name} (not run)"
    ((given, examples),) = ((k, v) for k, v in wanted.items() if k not in OUTPUTS)
    try:
        call = form.run(folder / form.file, given)
    except ImportError:
        return f"{name} (not run: its runtime is not installed)"
    except Exception as error:  # of a runtime, which has kinds of its own
        raise sc.FormatFault(f"{form.file} cannot be read ({_line(error)})") from error
    return f"{name} at most {apart(form, call, examples, wanted):.1g} off"


def apart(
    form: OtherForm,
    call: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    examples: np.ndarray,
    wanted: Mapping[str, np.ndarray],
) -> float:
    """How far a file's outputs are from those wanted; raises FormatFault where that is too much.

    One example at a time, and all of them together where it takes any number.
    """
    worst = 0.0
    parts = [slice(i, i + 1) for i in range(len(examples))]
    for part in [slice(None), *parts] if form.any_batch else parts:
        try:
            found = call(examples[part])
        except Exception as error:
            raise sc.FormatFault(f"{form.file} cannot be run ({_line(error)})") from error
        for output in OUTPUTS:
            value = wanted[output][part]
            got = np.asarray(found.get(output, ()))
            need(got.shape == value.shape, f"{form.file} gives no {output} of that shape")
            off = files.difference(got, value, counts=output in files.COUNTS)
            most = OTHERS if value.dtype.kind in "iub" else OFF
            need(off <= most, f"{form.file} gives another {output} than is stored, by {off:.2g}")
            worst = max(worst, off)
    return worst


def _line(error: Exception) -> str:
    return sc.first_line(error)[:200]
