"""Files of a path for other runtimes, in an exported folder: are they what the manifest says?

Where ONNX Runtime and LiteRT are installed they compute the stored examples again, in a process of
their own with limits of memory and time (`limited`): a stranger's file may ask for all there is. A
copy of this file travels in every export, beside `verify.py`.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

if __package__:
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import folder as files
    from moezoo.deploy.runtime import limited, programs
    from moezoo.deploy.runtime.forms import need
else:
    import folder as files  # pyright: ignore[reportMissingImports]
    import limited  # pyright: ignore[reportMissingImports]
    import programs  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]
    from forms import need  # pyright: ignore[reportMissingImports]

OUTPUTS = ("logits", "prediction", "violations")
OFF = 1e-4  # of numbers, relative to the largest; another runtime adds in another order
OTHERS = 1e-3  # of classes and counts, the share that may differ: ties fall otherwise
SAID = {"largest_difference": sc.number(0, 1)}


Call = Callable[[np.ndarray], Mapping[str, np.ndarray]]


class OtherForm(NamedTuple):
    """One of them.

    file: its name.   facts: the form of what a manifest says.   imported: brings the runtime in;
    raises ImportError where it is not installed, None where nothing but JAX reads the file.
    run: from a file, the input's name and the most threads, None for the runtime's choice, to a
    function from examples to their outputs by name.   begins: what stands in the file, and where.
    any_batch: whether it takes any number of examples, else one.
    """

    file: str
    facts: sc.CheckValue
    imported: Callable[[], object] | None
    run: Callable[..., Call] | None
    begins: tuple[int, bytes] = (0, b"")
    any_batch: bool = False


def _onnxruntime() -> Any:
    import onnxruntime

    return onnxruntime


def _onnx(file: Path, name: str, threads: int | None = None) -> Call:
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    run = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in run.get_outputs()]

    def call(given: np.ndarray) -> Mapping[str, np.ndarray]:
        return {k: np.asarray(v) for k, v in zip(names, run.run(None, {name: given}), strict=True)}

    return call


def _interpreter() -> Any:
    from ai_edge_litert import interpreter  # pyright: ignore

    return interpreter


def _litert(file: Path, name: str, threads: int | None = None) -> Call:
    made = _interpreter().Interpreter(model_path=str(file), num_threads=threads)
    run = made.get_signature_runner()

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
        _onnxruntime,
        _onnx,
        any_batch=True,
    ),
    "litert": OtherForm(
        "model.tflite",
        sc.table({**SAID, "batch": sc.whole(1)}, ("largest_difference",), others=sc.refused),
        _interpreter,
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
        None,
        (0, b"ML\xefR"),
    ),
}


def check(
    folder: Path,
    manifest: Mapping[str, Any],
    wanted: Mapping[str, np.ndarray],
    memory: int | None = None,
) -> str | None:
    """What was found right, in words; raises FormatFault for what is not.

    wanted: the stored inputs, under the input's name, and outputs.   memory: the most bytes that a
    runtime may take; None: what suits the file, the examples and this machine.
    """
    stated = manifest.get("formats", {})
    sc.map_of(sc.anything)(stated, "formats")
    for name in stated:
        need(name in FORMS, f"formats has {sc.shown(name)}, which is none of {', '.join(FORMS)}")
    for name, form in FORMS.items():
        there = form.file in manifest["files"]
        need(there == (name in stated), f"formats and files do not agree about {form.file}")
    sizes = [(folder / name).stat().st_size for name in manifest["files"]]
    room = programs.room(sum(sizes) + sum(a.nbytes for a in wanted.values()))
    most = room if memory is None else memory
    told = [_one(folder, facts, name, wanted, most) for name, facts in stated.items()]
    return ", ".join(told) or None


def _one(folder: Path, facts: Any, name: str, wanted: Mapping[str, np.ndarray], memory: int) -> str:
    form = FORMS[name]
    form.facts(facts, f"formats.{name}")
    at, mark = form.begins
    with open(folder / form.file, "rb") as file:
        start = file.read(at + len(mark))
    need(start[at:] == mark, f"{form.file} is no file of its kind")
    if form.run is None:
        return f"{name} (not run)"
    order = {"folder": str(folder.resolve()), "form": name, "memory": memory}
    said, ended = limited.asked("other_forms", _packed(order, wanted))
    need(not ended, f"{form.file} {ended}")
    if said is None:
        return f"{name} (not run: its runtime is not installed)"
    if isinstance(said, str):
        raise sc.FormatFault(said)
    return f"{name} at most {said:.1g} off"


def _packed(order: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """What the other process reads: a line of JSON, and arrays."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    return json.dumps(order).encode() + b"\n" + content.getvalue()


def answer() -> None:
    """As the other process: how far a file's outputs are from those wanted.

    Prints a number, a sentence about what is wrong, or null where the runtime is not installed.
    """
    order, _, arrays = sys.stdin.buffer.read().partition(b"\n")
    told, wanted = json.loads(order), dict(np.load(io.BytesIO(arrays), allow_pickle=False))
    print(json.dumps(_said(told, wanted)), flush=True)


def _said(order: Mapping[str, Any], wanted: Mapping[str, np.ndarray]) -> float | str | None:
    form = FORMS[order["form"]]
    assert form.imported is not None and form.run is not None
    ((given, examples),) = ((k, v) for k, v in wanted.items() if k not in OUTPUTS)
    try:
        form.imported()
    except ImportError:
        return None
    limited.hold(order["memory"])  # the runtime itself is there by now
    try:
        # One thread: each has address space of its own, on a large machine more than all the rest.
        call = form.run(Path(order["folder"]) / form.file, given, 1)
    except (Exception, MemoryError) as error:  # of a runtime, which has kinds of its own
        return f"{form.file} cannot be read ({_line(error)})"
    try:
        return apart(form, call, examples, wanted)
    except sc.FormatFault as error:
        return str(error)


def apart(
    form: OtherForm,
    call: Call,
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
