"""Export one task of a run as a folder that runs without moezoo.

Example: moezoo export runs/m3vit_tiny --task depth --out exports/depth
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moezoo.command import ANYWHERE, WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class ExportCommand:
    """Export one task of a run as a folder that runs without moezoo, or compare all its paths.

    Example: moezoo export runs/m3vit_tiny --task depth --out exports/depth

    Example: moezoo export runs/m3vit_tiny --compare --json costs.json
    """

    run: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint or a saved model, or the name of a model with weights."""
    task: str | None = None
    """The task to export; for a run on pairs: scene."""
    out: Annotated[Path | None, ANYWHERE] = None
    """Folder to write."""
    keep: int | Literal["all"] = "all"
    """Experts to keep in every MoE layer; moezoo prune has more ways to choose."""
    compare: bool = False
    """Instead of exporting, print a table of the whole model and of every task's path with all,
    half and a quarter of its experts (parameters, bytes, FLOPs, latency, scores)."""
    json: Annotated[Path | None, ANYWHERE] = None
    """With --compare: also write the numbers to this file."""
    weights: Literal["float32", "bfloat16", "int8"] = "float32"
    """How weights are stored: int8 with a scale for every output channel, or bfloat16; what that
    changes is measured and certified."""
    formats: tuple[Literal["onnx", "litert", "stablehlo"], ...] = ()
    """In which formats the path is written besides: onnx (needs the extra onnx), litert (phones;
    needs LiteRT and its converter), stablehlo (the bare program in an older version)."""
    calibration: int = 256
    """Training examples that decide which experts stay."""
    batch: int = 32
    """Examples per step."""
    replace: bool = False
    """Replace an export that is already in the folder."""


def _check_kind(run: Path, task: str | None) -> None:
    """UserError for a folder whose models are cut by another command, which it names."""
    from moezoo import registry, storage
    from moezoo.weights.hf_files import holds_model

    # A model's name, or a run in a store: what says no then is the run's own domain.
    if storage.is_stored(run) or not run.is_dir():
        return
    if (run / "manifest.json").is_file() or not (
        holds_model(run) or (run / "config.json").is_file()
    ):
        return  # an export, or no run either, as will be said
    own = registry.cutter(run)
    instead = None if own is None else own.instead(task)
    if instead is not None:
        raise UserError(instead)


def main(words: list[str], prog: str) -> int:
    """Cut out a task, certify it, write the export; or compare all paths."""
    from moezoo.deploy import deliver
    from moezoo.deploy.produce import Request

    a = parse(ExportCommand, words, prog)
    _check_kind(a.run, a.task)
    keep = None if a.keep == "all" else a.keep
    request = Request(keep, weights=a.weights, calibration=a.calibration, batch=a.batch)
    if a.compare and a.out is not None:
        raise UserError("--compare writes no export: leave out either --out or --compare.")
    if a.compare and (a.keep != "all" or a.replace):
        raise UserError("--compare needs neither --keep nor --replace: leave them out.")
    if a.compare and (a.formats or a.weights != "float32"):
        raise UserError("--compare writes no export: leave out --formats and --weights.")
    if a.json is not None and not a.compare:
        raise UserError("--json needs --compare: without it nothing would be written there.")
    if a.compare:
        deliver.compare_run(a.run, request, a.json, a.task)
        return 0
    if a.task is None or a.out is None:
        raise UserError("Name the task and the folder to write: --task TASK --out FOLDER.")
    deliver.export_run(a.run, a.task, request, a.out, replace=a.replace, formats=a.formats)
    return 0
