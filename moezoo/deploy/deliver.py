"""The work of `moezoo prune` and `moezoo export`: produce, write, show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.deploy import export, pictures, produce, table
from moezoo.deploy.export import Content
from moezoo.deploy.produce import Produced, Request, TrainedRun
from moezoo.deploy.runtime.load import load_export
from moezoo.json_text import json_text
from moezoo.train.console import Console
from moezoo.train.files import check_file, write_atomically


def export_run(
    run: Path,
    task: str,
    request: Request,
    out: Path,
    *,
    replace: bool = False,
    console: Console | None = None,
) -> Path:
    """Write one task of a run as an export; a pruned one gets plan, calibration and pictures too.

    Raises UserError for anything that stands in the way, before any long work where it can.
    """
    console = console or Console()
    export.check_free(out, replace=replace)
    trained = produce.open_run(run, request.calibration, task, fewer=not request.whole)
    export.check_input(trained.exporter.input)
    made = produce.produce(trained, task, request, console)
    return export_path(trained, made, out, replace=replace, console=console)


def export_path(
    trained: TrainedRun,
    made: Produced,
    out: Path,
    *,
    replace: bool = False,
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

    def check(folder: Path) -> None:
        apart.append(export.read_back(folder, out, load_export))

    def more(folder: Path) -> None:
        add(folder, trained, made)

    export.write(out, content, more=more, check=check, replace=replace)
    console.table(f"{task} of {trained.name}", ("", ""), summary(made))
    console.say(f"{out}: written, loaded again, outputs differ by at most {apart[0]:.1g}")
    return out


def add(folder: Path, trained: TrainedRun, made: Produced) -> None:
    """What a pruned path's export has besides: plan, calibration, pictures of both."""
    if made.calibration is None:
        return
    write_atomically(folder / "plan.json", made.path.plan.to_json() + "\n")
    made.calibration.save(folder / "calibration.npz")
    pictures.usage(folder / "pictures/usage.png", made.calibration, made.path)
    part, file = trained.parts.verification, folder / "pictures/predictions.png"
    shown = trained.exporter.picture
    pictures.predictions(file, made.whole, made.path, made.task, part, shown)


def summary(made: Produced) -> list[tuple[str, str]]:
    """The certificate's main numbers, for the console."""
    stated = made.certificate
    cost, test = stated["cost"], stated["test"]
    name, unit = test["metric"], made.path.input.unit
    lines = [
        ("kind", stated["kind"]),
        ("parameters", f"{cost['parameters']:,}"),
        ("bytes", f"{cost['bytes']:,}"),
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


def _rate(disagreement: dict[str, Any], examples: int, unit: str) -> str:
    bound = 100 * disagreement["rate_at_most"]
    return f"{disagreement['events']} of {examples} {unit} (95 %: at most {bound:.1f} %)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
