"""Check an exported folder against what it says of itself: run its program again, count, compare.

    python verify.py            of the folder that this file lies in
    python verify.py FOLDER

Needs JAX, NumPy, SciPy and flatbuffers; not moezoo, of which it imports nothing but what lies
beside it. A folder from a stranger: run your own copy of this file (`moezoo verify FOLDER`), which
reads the stranger's data and none of his programs but the one of arithmetic (see `load`).

What it can show: that the folder is whole, that its computation gives the stored outputs on this
machine, that what is counted (parameters, bytes, experts) is there, and that what is said fits
together: kinds of layers, the plan, bounds and the numbers that they are of. What it cannot: that
the figures of accuracy were measured, since the data are not in the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo import regular
    from moezoo import schema_check as sc
    from moezoo.deploy.runtime import folder as files
    from moezoo.deploy.runtime import forms, load, other_forms, programs
    from moezoo.deploy.runtime.forms import ExportError
else:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.dont_write_bytecode = True  # the folder stays as it was written
    import folder as files  # pyright: ignore[reportMissingImports]
    import forms  # pyright: ignore[reportMissingImports]
    import other_forms  # pyright: ignore[reportMissingImports]
    import predict as load  # pyright: ignore[reportMissingImports]
    import programs  # pyright: ignore[reportMissingImports]
    import regular  # pyright: ignore[reportMissingImports]
    import schema_check as sc  # pyright: ignore[reportMissingImports]
    from forms import ExportError  # pyright: ignore[reportMissingImports]

LEVEL = 0.95  # of the one-sided bounds
MOST = 256  # stored examples, each of which is computed by itself, too
CLOSE = 1e-6  # of numbers that went through text
IDS = sc.list_of(sc.whole(0, 2**20))
LAYER = sc.table(
    {
        "decision": sc.line(40),
        "experts": sc.whole(0, 2**20),
        "kept": IDS,
        "chosen": sc.whole(0, 2**20),
        "reach": sc.maybe(IDS),
        "hidden": sc.maybe(sc.whole(1, 2**30)),
        "width": sc.maybe(sc.whole(0, 2**50)),
        "kind": sc.one_of("exact_fold", "exact_support", "whole", "pruned"),
    },
    ("experts", "kept", "kind"),
)
RATE = sc.table(
    {
        "trials": sc.whole(1),
        "events": sc.whole(),
        "rate": sc.number(0, 1),
        "rate_at_most": sc.number(0, 1),
        "level": sc.number(),
    },
    ("trials", "events", "rate", "rate_at_most", "level"),
)
SCORES = sc.map_of(sc.maybe(sc.number()), 1)
CERTIFICATE = sc.table(
    {
        "task": sc.line(200),
        "kind": sc.one_of("exact", "pruned"),
        "layers": sc.map_of(LAYER),
        "plan": sc.table({"hash": sc.text(64)}, ("hash",)),
        "cost": sc.table(
            {"parameters": sc.whole(0, 2**62), "bytes": sc.whole(0, 2**62)},
            ("parameters", "bytes"),
        ),
        "verification": sc.table(
            {"coverage": sc.number(0, 1), "disagreement": sc.list_of(RATE, 1)},
            ("coverage", "disagreement"),
        ),
        "test": sc.table(
            {"metric": sc.line(200), "full": SCORES, "path": SCORES, "change": sc.number()},
            ("metric", "full", "path", "change"),
        ),
    },
    ("task", "kind", "layers", "plan"),
)


class AnyInput:
    """The reader of an input, for stored inputs only: any steps may have led to them."""

    STEPS = staticmethod(sc.anything)

    @staticmethod
    def fits(shape: Any, steps: Any, place: str) -> None:
        """No check."""


def verify(folder: Path, memory: int | None = None) -> list[tuple[str, str]]:
    """What was checked and found right, in words; ExportError for the first thing that is not.

    memory: the most bytes that a program may take (`load.load_export`).
    """
    manifest = files.read_manifest(folder, lambda found: forms.one_task(found, lambda _: AnyInput))
    try:
        sc.table({"path": sc.map_of(sc.anything)}, ("path",))(manifest, "manifest.json")
    except sc.FormatFault as error:
        raise ExportError(f"{folder} is not whole: {error}.") from error
    files.verify(folder, manifest)
    stated = stated_of(folder, manifest)
    said = [
        ("files", f"{len(manifest['files'])} with the listed checksums{_beside(folder, manifest)}")
    ]
    weights = load.read_tensors(folder / "model.safetensors")
    said.append(("computation", recomputed(folder, manifest, stated, weights, memory)))
    checks = CHECKS | {"other formats": partial(_formats, memory=memory)}
    for what, check in checks.items():
        try:
            told = check(folder, manifest, stated, weights)
        except sc.FormatFault as error:
            raise ExportError(f"{folder} contradicts itself: {error}.") from error
        said += [] if told is None else [(what, told)]
    return said


def _beside(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Files that are there and nobody says anything of, in words."""
    there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    more = sorted(there - set(manifest["files"]) - {"manifest.json"})
    if not more:
        return ""
    shown = ", ".join(sc.shortened(name, 60) for name in more[:3])
    return f"; not listed, and not looked at: {shown}{' and others' if more[3:] else ''}"


def stated_of(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The certificate, whose form is right and which the manifest holds, too."""
    file = folder / "certificate.json"
    try:
        stated = sc.parse(regular.read(file, files.MANIFEST, ExportError, files.AGAIN))
        CERTIFICATE(stated, "")
    except sc.FormatFault as error:
        raise ExportError(f"{file} is no certificate of a path ({error}).") from error
    if manifest.get("certificate") != stated:
        raise ExportError(f"{file} and the certificate in manifest.json are not the same.")
    return stated


def recomputed(
    folder: Path,
    manifest: Mapping[str, Any],
    stated: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    memory: int | None,
) -> str:
    """Run the program on the stored inputs, together and one by one."""
    ((name, form),) = manifest["inputs"].items()
    outputs = {k: (o["shape"], o["dtype"]) for k, o in manifest["outputs"].items()}
    arrays = [(form["shape"], form["dtype"])]
    found = load.checked(folder / "model.stablehlo", manifest, weights, arrays, outputs)
    golden = files.stored_inputs(folder, {name: None})
    given = golden[name]
    fits = list(given.shape[1:]) == form["shape"][1:] and str(given.dtype) == form["dtype"]
    if not (fits and 1 <= len(given) <= MOST):
        raise ExportError(
            f"The stored inputs of {folder} are not 1 to {MOST} examples as its manifest describes "
            "them."
        )
    program = programs.Program(found, memory)
    together = program(weights, given)
    off = files.check_outputs(folder, manifest, together, golden)
    single = [program(weights, given[i : i + 1]) for i in range(len(given))]
    alone = {k: np.concatenate([one[k] for one in single]) for k in together}
    off = max(off, files.check_outputs(folder, manifest, alone, golden))
    if stated["kind"] == "exact" and np.any(together["violations"]):
        raise ExportError(
            f"{folder} contradicts itself: its path is said to be exact, but stored inputs ask "
            "for experts that it has not got."
        )
    clean = int(np.sum(together["violations"] == 0))
    return (
        f"{len(given)} stored examples, together and one by one: at most {off:.1g} off the stored "
        f"outputs; {clean} of them without violation"
    )


def _formats(
    folder: Path, manifest: Any, stated: Any, weights: Any, memory: int | None = None
) -> str | None:
    ((name, _),) = manifest["inputs"].items()
    wanted = files.stored_inputs(folder, dict.fromkeys((name, *other_forms.OUTPUTS)))
    kept = {key: wanted[key] for key in (name, *other_forms.OUTPUTS)}
    return other_forms.check(folder, manifest, kept, memory)


def _parameters(folder: Path, manifest: Any, stated: Any, weights: Any) -> str:
    count = sum(int(np.prod(w.shape)) for w in weights.values())
    size = sum(w.nbytes for w in weights.values())
    said = {"manifest.path": manifest.get("path", {}).get("parameters")}
    said |= {"cost": stated.get("cost", {}).get("parameters", count)}
    for place, number in said.items():
        forms.need(number == count, f"{place} says {sc.shown(number)} parameters, {count:,} there")
    number = stated.get("cost", {}).get("bytes", size)
    forms.need(number == size, f"cost says {number:,} bytes of weights, {size:,} are there")
    return f"{count:,}, {size:,} bytes"


def _layers(folder: Path, manifest: Any, stated: Any, weights: Any) -> str:
    layers, path = stated["layers"], manifest.get("path", {})
    for name, layer in layers.items():
        _one_layer(name, layer, weights)
    forms.need(path.get("layers") == layers, "manifest.path.layers are not the certificate's")
    forms.need(path.get("kind") == stated["kind"], "manifest.path.kind is not the certificate's")
    exact = all(layer["kind"] != "pruned" for layer in layers.values())
    forms.need(exact == (stated["kind"] == "exact"), "kind does not follow from those of layers")
    return ", ".join(f"{sc.shortened(k, 60)}: {v['kind']}" for k, v in layers.items())


def _one_layer(name: str, layer: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> None:
    """Which experts are there decides what the layer is called."""
    kept, place = layer["kept"], f"layers.{sc.shortened(name, 60)}"
    every = list(range(layer["experts"]))
    forms.need(sorted(set(kept)) == kept and set(kept) <= set(every), f"{place}.kept is no choice")
    asked = every if layer.get("reach") is None else layer["reach"]
    kind = "pruned" if set(asked) - set(kept) else "whole" if kept == every else "exact_support"
    kind = kind if kept or kind == "pruned" else "exact_fold"
    forms.need(layer["kind"] == kind, f"{place} is called {layer['kind']}, by its experts {kind}")
    hidden = layer.get("hidden")
    wide = not kept or hidden is None
    for array, value in weights.items():
        inside = array.removeprefix(f"{name}/experts/").split("/")
        stacked = array.startswith(f"{name}/experts/") and not any(p.isdigit() for p in inside)
        if stacked:
            fits = value.ndim > 0 and value.shape[0] == len(kept)
            forms.need(fits, f"{place} keeps {len(kept)} experts, its arrays have others")
            wide = wide or hidden in value.shape[1:]
    width = None if hidden is None else hidden * len(kept)
    forms.need(layer.get("width") == width, f"{place}.width is not {sc.shown(width)}")
    forms.need(wide, f"{place}.hidden is {hidden}, its experts have other widths")


def _plan(folder: Path, manifest: Any, stated: Any, weights: Any) -> str:
    file = folder / "config.json"
    form = sc.table({"path": sc.table({"plan": sc.map_of(sc.anything)}, ("plan",))}, ("path",))
    found = sc.parse(regular.read(file, files.MANIFEST, ExportError, files.AGAIN))
    form(found, "config.json")
    plan = found["path"]["plan"]
    text = json.dumps(plan, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    said = (stated["plan"]["hash"], manifest.get("path", {}).get("plan"))
    forms.need(said == (digest, digest), "the plan in config.json is not the one certified")
    for name, kept in (plan.get("kept") or {}).items():
        layer = stated["layers"].get(name, {})
        forms.need(layer.get("kept") == kept, f"the plan keeps other experts in {sc.shown(name)}")
    forms.need(plan.get("task") == stated["task"] == manifest["task"]["name"], "tasks differ")
    return f"{digest}, the experts that are there"


def _bounds(folder: Path, manifest: Any, stated: Any, weights: Any) -> str | None:
    held = stated.get("verification")
    if held is None:
        forms.need(stated["kind"] == "exact", "a pruned path has no verification")
        return None
    for i, one in enumerate(held["disagreement"]):
        place = f"verification.disagreement[{i}]"
        n, v = one["trials"], one["events"]
        forms.need(v <= n, f"{place} has {v} events in {n} trials")
        forms.need(_same(one["rate"], v / n), f"{place}.rate is not {v} of {n}")
        bound = _upper(v, n)
        forms.need(_same(one["rate_at_most"], bound), f"{place}.rate_at_most is not {bound:.6g}")
    ordered = sorted(held["disagreement"], key=lambda one: one["level"])
    falls = all(a["events"] >= b["events"] for a, b in zip(ordered, ordered[1:], strict=False))
    forms.need(falls, "verification.disagreement has more events at a higher level")
    n = held["disagreement"][0]["trials"]
    clean = held["coverage"] * n
    forms.need(_same(clean, round(clean)), f"verification.coverage is no share of {n} examples")
    # Examples without violation get the full model's output, where routers kept their columns and
    # weights their bits: they cannot be among the events.
    same = stated["plan"].get("novices") != "cut" and not {"weights", "recovery"} & set(stated)
    most = n - round(clean) if same else n
    fits = all(one["events"] <= most for one in held["disagreement"])
    forms.need(fits, "verification.disagreement has events among examples without violation")
    return f"{len(held['disagreement'])} one-sided 95 % bounds on {n} examples"


def _upper(events: int, trials: int) -> float:
    """The one-sided Clopper-Pearson bound on a rate."""
    from scipy.stats import beta

    return 1.0 if events == trials else float(beta.ppf(LEVEL, events + 1, trials - events))


def _scores(folder: Path, manifest: Any, stated: Any, weights: Any) -> str | None:
    test = stated.get("test")
    if test is None:
        return None
    before, after = (test[which].get(test["metric"]) for which in ("full", "path"))
    if before is None or after is None:
        raise sc.FormatFault(f"test has no {sc.shown(test['metric'])} of both")
    forms.need(_same(test["change"], after - before), "test.change is not the scores' difference")
    return f"{test['metric']} {before:.4f} of the full model, {after:.4f} of the path"


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)


CHECKS: dict[str, Callable[[Path, Any, Any, Any], str | None]] = {
    "other formats": _formats,
    "parameters": _parameters,
    "layers": _layers,
    "plan": _plan,
    "bounds": _bounds,
    "scores": _scores,
}


def main(words: list[str] | None = None) -> int:
    """The command: a line for each thing that is right, or one sentence and 2."""
    given = sys.argv[1:] if words is None else words
    if len(given) > 1 or any(word.startswith("-") for word in given):
        print("usage: python verify.py [FOLDER]", file=sys.stderr)
        return 2
    folder = Path(given[0]) if given else Path(__file__).resolve().parent
    try:
        with programs.at_most(load.GIVE_UP):
            said = verify(folder)
    except ExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what, told in said:
        print(f"{what}: {told}")
    print(f"{folder} is what it says.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
