"""The work of `moezoo prune` and `moezoo export`: produce, write, show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace as replaced
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.deploy import (
    curve,
    export,
    litert_file,
    novices,
    onnx_file,
    page,
    pictures,
    produce,
    stablehlo_file,
    sweep,
    table,
)
from moezoo.deploy.calibrate import Calibration
from moezoo.deploy.export import Content
from moezoo.deploy.path import TaskPath
from moezoo.deploy.produce import Produced, Request, TrainedRun
from moezoo.deploy.runtime import other_forms
from moezoo.deploy.runtime.load import load_export
from moezoo.deploy.sweep import Curve, Limits, Method
from moezoo.errors import UserError, unknown
from moezoo.files import check_file, write_atomically
from moezoo.json_text import json_text
from moezoo.train.console import Console

# In what else than `jax.export` a path can be written: modules with `check`, `converted`, `write`.
FORMATS: dict[str, Any] = {
    "onnx": onnx_file,
    "litert": litert_file,
    "stablehlo": stablehlo_file,
}


def export_run(
    run: Path,
    task: str,
    request: Request,
    out: Path,
    *,
    replace: bool = False,
    formats: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Write one task of a run as an export; a pruned one gets plan, calibration and pictures too.

    formats: of `FORMATS`, in which it is written besides. Raises UserError for anything that stands
    in the way, before any long work where it can.
    """
    console = console or Console()
    export.check_free(out, replace=replace)
    check_formats(formats, request)
    trained = produce.open_run(run, request.calibration, task, fewer=not request.whole)
    export.check_input(trained.exporter.input)
    try_formats(trained, task, formats)
    made = produce.produce(trained, task, request, console)
    return export_path(trained, made, out, replace=replace, formats=formats, console=console)


def check_formats(formats: Sequence[str], request: Request) -> None:
    """UserError for an unknown format, and for one that cannot be written here."""
    lacking: list[str] = []  # told together: who installs a package wants to know of the other
    for name in formats:
        if name not in FORMATS:
            raise unknown("format", name, list(FORMATS))
        try:
            FORMATS[name].check(request.weights)
        except UserError as error:
            lacking.append(str(error))
    if lacking:
        raise UserError(" ".join(lacking))


def try_formats(trained: TrainedRun, task: str, formats: Sequence[str]) -> None:
    """UserError, before long work, where the whole path cannot be written in one of the formats."""
    if formats:
        whole = produce.whole_path(trained, task)
        for name in formats:
            FORMATS[name].converted(whole, trained.subject.tasks[task])


def export_path(
    trained: TrainedRun,
    made: Produced,
    out: Path,
    *,
    replace: bool = False,
    formats: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Write a path that was produced as an export, read it back, and say what it costs."""
    console, task = console or Console(), made.path.task
    content = Content(
        path=made.path,
        task=produce.fitted(trained, made.task),
        about=produce.facts(trained, task),
        config=produce.config_of(trained),
        certificate=made.certificate,
        golden=produce.golden_inputs(trained),
    )
    apart: list[float] = []
    told: dict[str, dict[str, Any]] = {}

    def check(folder: Path) -> None:
        apart.append(export.read_back(folder, out, load_export))

    def more(folder: Path) -> dict[str, Any]:
        add(folder, trained, made)
        given = np.ascontiguousarray(content.golden, made.path.input.dtype)
        for name in formats:
            told[name] = FORMATS[name].write(folder, made.path, content.task, given)
        return {"formats": told} if told else {}

    export.write(out, content, more=more, check=check, replace=replace)
    console.table(f"{task} of {trained.name}", ("", ""), summary(made))
    for name, facts in told.items():
        file = out / other_forms.FORMS[name].file
        size, off = file.stat().st_size / 1e6, facts["largest_difference"]
        console.say(f"{file}: {size:.2f} MB, outputs differ by at most {off:.1g}")
    console.say(f"{out}: written, loaded again, outputs differ by at most {apart[0]:.1g}")
    return out


def add(folder: Path, trained: TrainedRun, made: Produced) -> None:
    """What an export has besides: a page; of a pruned path plan, calibration, pictures of both."""
    if made.calibration is None:
        _add_page(folder, trained, made, {})
        return
    write_atomically(folder / "plan.json", made.path.plan.to_json() + "\n")
    made.calibration.save(folder / "calibration.npz")
    pictures.usage(folder / "pictures/usage.png", made.calibration, made.path)
    part, file = trained.parts.verification, folder / "pictures/predictions.png"
    shown = trained.exporter.picture
    pictures.predictions(file, made.whole, made.path, made.task, part, shown)
    names = {"experts": "usage", "predictions": "predictions"}
    drawn = {title: folder / f"pictures/{name}.png" for title, name in names.items()}
    _add_page(folder, trained, made, drawn)


def _add_page(folder: Path, trained: TrainedRun, made: Produced, drawn: Mapping[str, Path]) -> None:
    """The certificate as a page."""
    section = page.certificate_section(made.certificate, summary(made), drawn)
    title = f"{made.path.task} of {trained.name}"
    page.write(folder / "index.html", title, made.certificate["statement"], [section])


def summary(made: Produced) -> list[tuple[str, str]]:
    """The certificate's main numbers, for the console."""
    stated = made.certificate
    cost, test = stated["cost"], stated["test"]
    name, unit = test["metric"], made.path.input.unit
    lines = [
        ("kind", stated["kind"]),
        ("parameters", f"{cost['parameters']:,}"),
        ("bytes", f"{cost['bytes']:,}"),
        *([("weights", stated["weights"]["type"])] if "weights" in stated else []),
        (f"GFLOP per {unit[:-1]}", table.gigaflops(cost)),
        *((f"ms at batch {m['batch']}", f"{m['median_ms']:.2f}") for m in cost["latency"]),
        (f"{name} on {test[unit]} test {unit}", _number(test["path"][name])),
    ]
    if "full_model" in stated:
        apart = stated["full_model"]["largest_difference"]
        lines.append(("logits off the full model's", f"{apart:.1g}"))
    if "verification" not in stated:
        return lines
    held = stated["verification"]
    return [
        *lines,
        (f"{name} with all experts", _number(test["full"][name])),
        (f"{unit} without violation", f"{100 * held['coverage']:.1f} %"),
        ("weight on kept experts", f"{100 * held['kept_gate_share']:.1f} %"),
        *((d["event"], _rate(d, held[unit], unit)) for d in held["disagreement"]),
    ]


def compare_run(
    run: Path,
    request: Request,
    json_file: Path | None = None,
    task: str | None = None,
    console: Console | None = None,
) -> list[tuple[object, ...]]:
    """Show (and write) cost and scores of the whole model and of every task's paths."""
    console = console or Console()
    check_file(json_file)
    trained = produce.open_run(run, request.calibration, task)
    full = table.full_model(trained)
    made = table.compare_paths(trained, request, console, None if task is None else [task])
    rows = table.rows(full, made)
    unit = trained.parts.test.unit[:-1]
    console.say(f"{run} on {full['device']}; ms: median of one {unit}")
    console.say(table.markdown(rows))
    if json_file is not None:
        numbers: dict[str, Any] = {"full": full, "paths": [m.certificate for m in made]}
        write_atomically(json_file, json_text(numbers, 1, sort_keys=True))
    return rows


def sweep_run(
    run: Path,
    task: str | None,
    request: Request,
    out: Path,
    *,
    replace: bool = False,
    console: Console | None = None,
) -> list[Curve]:
    """Write the trade-off curves of one task of a run, or of all: curve.json, curve.png.

    Raises UserError for anything that stands in the way, before any long work where it can.
    """
    console = console or Console()
    export.check_free(out, replace=replace, mark=CURVE)
    trained = produce.open_run(run, request.calibration, task, fewer=True)
    names = list(trained.subject.tasks) if task is None else [task]
    return sweep_trained(trained, names, request, out, console)


def sweep_trained(
    trained: TrainedRun, tasks: Sequence[str], request: Request, out: Path, console: Console
) -> list[Curve]:
    """As `sweep_run`, of these tasks of a run that is open already; `out` is free."""
    seen = [curve_of(trained, name, request, console) for name in tasks]
    curves = [one.curve for one in seen]
    with export.written(out) as folder:
        numbers = {"run": trained.name, "step": trained.step}
        numbers |= {"curves": [made.to_json() for made in curves]}
        write_atomically(folder / CURVE, json_text(numbers, 1, sort_keys=True))
        curve.picture(folder / "curve.png", curves)
        sections = [page.sweep_section(trained, one.whole, one.found, one.curve) for one in seen]
        page.write(
            folder / "index.html", f"{trained.name}: what fewer experts cost", PAGE, sections
        )
    for made in curves:
        _show(made, trained, console)
    console.say(f"{out}: index.html (open it in a browser), {CURVE}, curve.png")
    return curves


def export_within(
    run: Path,
    task: str,
    request: Request,
    limits: Limits,
    out: Path,
    *,
    replace: bool = False,
    formats: Sequence[str] = (),
    console: Console | None = None,
) -> Path:
    """Export the path with the fewest experts per layer that keeps the limits (`sweep.choose`).

    Raises UserError where not even one expert per layer can be missed, and as `export_run`.
    """
    console = console or Console()
    export.check_free(out, replace=replace)
    check_formats(formats, request)
    trained = produce.open_run(run, request.calibration, task, fewer=True)
    export.check_input(trained.exporter.input)
    try_formats(trained, task, formats)
    produced = produce_within(trained, task, request, limits, console)
    return export_path(trained, produced, out, replace=replace, formats=formats, console=console)


def produce_within(
    trained: TrainedRun, task: str, request: Request, limits: Limits, console: Console
) -> Produced:
    """The path with the fewest experts per layer that keeps the limits (`sweep.choose`).

    Raises UserError where not even one expert per layer can be missed.
    """
    own = sweep.methods(trained, request)[:1]
    seen = curve_of(trained, task, request, console, own)
    made = seen.curve
    _show(made, trained, console)
    chosen = sweep.choose(made, own[0], limits)
    if chosen is None:
        raise UserError(
            f"With {made.points[own[0]][0].keep} experts per layer {task} already loses more than "
            f"{limits}, by the 95 % bounds on {len(trained.parts.verification.source)} "
            f"verification {made.unit}: allow more, or export the task whole."
        )
    console.say(f"{chosen.keep} per layer are the fewest experts that keep to {limits}.")
    # What was measured for the curve is what a path of this many experts is made of.
    asked = request.changed(keep=chosen.keep)
    produced = produce.produce(trained, task, asked, console, found=seen.found)
    produced.certificate["chosen_by"] = {"limits": vars(limits), "curve": made.to_json()}
    return produced


def curve_of(
    trained: TrainedRun,
    task: str,
    request: Request,
    console: Console,
    ways: Sequence[Method] | None = None,
) -> Swept:
    """One task's trade-off curve; ways: the methods, by default those of `sweep.methods`."""
    whole = produce.whole_path(trained, task)
    sweep.check(trained, whole, request)
    ways = sweep.methods(trained, request) if ways is None else ways
    # One pass over the calibration examples for all methods: those with maps need the most.
    kinds = [novices.by_name(way.novice) for way in ways if way.router != "cut"]
    most = max((kind for kind in kinds), key=lambda kind: kind.moments, default=novices.MEAN)
    asked = replaced(request, novice=None if not kinds else most.name, router=None)
    found = produce.measure(trained, whole, asked, console)
    return Swept(whole, found, sweep.sweep(trained, whole, found, ways, request, console))


class Swept(NamedTuple):
    """A task's curve, and what it was made of."""

    whole: TaskPath
    found: Calibration
    curve: Curve


PAGE = (
    "The path of one task with fewer and fewer experts per layer, on examples that decided "
    "nothing. Move the slider: it shows what each way of removing experts loses, and what the "
    "first of them predicts."
)
CURVE = "curve.json"


def sweep_table(made: Curve) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows for the console: the loss by method and by experts per layer."""
    keeps = sorted({p.keep for points in made.points.values() for p in points}, reverse=True)
    first = next(iter(made.points.values()))
    sizes = {point.keep: f"{point.cost['bytes'] / 1e6:.2f}" for point in first}
    times = {point.keep: f"{point.latency['median_ms']:.2f}" for point in first}
    rows = [
        ("MB, first method", *(sizes.get(keep, "-") for keep in keeps)),
        (f"ms for {first[0].latency['batch']}, first method", *(times.get(k, "-") for k in keeps)),
    ]
    for method, points in made.points.items():
        losses = {p.keep: _percent(p.test["relative_loss"]["value"]) for p in points}
        rows.append((method.label, *(losses.get(keep, "-") for keep in keeps)))
    return (f"loss of {made.metric}, %; experts:", *map(str, keeps)), rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{round(100 * value, 1) + 0.0:.1f}"  # no -0.0


def _show(made: Curve, trained: TrainedRun, console: Console) -> None:
    header, rows = sweep_table(made)
    full = f"{made.metric} {made.full:.4g} with all experts"
    console.table(f"{made.task} of {trained.name}: {full}", header, rows)


def _rate(disagreement: dict[str, Any], examples: int, unit: str) -> str:
    bound = 100 * disagreement["rate_at_most"]
    return f"{disagreement['events']} of {examples} {unit} (95 %: at most {bound:.1f} %)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
