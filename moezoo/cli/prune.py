"""Cut one task out of a run and remove experts it hardly uses.

Example: moezoo prune runs/m3vit_tiny --task depth --keep 4 --out exports/depth4
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moezoo.command import Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class PruneCommand:
    """Cut one task out of a run, remove experts, measure what was lost, export the result.

    The folder is an export like the one that moezoo export writes, with the plan, the
    calibration and pictures beside it.

    Example: moezoo prune runs/m3vit_tiny --task depth --keep 4 --out exports/depth4
    """

    run: Annotated[Path, Positional]
    """Folder of a run, a checkpoint or a saved model, or the name of a model with weights."""
    task: str
    """The task to keep."""
    out: Path
    """Folder to write."""
    keep: int | None = None
    """Experts to keep in every MoE layer."""
    total: int | None = None
    """Instead: experts to keep over all layers; layers that matter more keep more."""
    usage: float | None = None
    """Instead: keep the experts whose share of the task's choices is above this percentage
    divided by k (Mod-Squad's rule)."""
    score: Literal["reap", "gram", "residual", "gate_sum", "frequency", "random"] = "reap"
    """How an expert's worth is measured: reap is the sum of weight times output norm."""
    calibration: int = 256
    """Training examples that decide which experts stay."""
    batch: int = 32
    """Examples per step."""
    replace: bool = False
    """Replace an export that is already in the folder."""


def main(words: list[str], prog: str) -> int:
    """Calibrate, cut out the task, certify it, write the export."""
    from moezoo.deploy import deliver
    from moezoo.deploy.produce import Request

    a = parse(PruneCommand, words, prog)
    if (a.keep, a.total, a.usage) == (None, None, None):
        raise UserError(
            "Say how many experts stay: --keep (per layer), --total (all layers) or --usage."
        )
    request = Request(a.keep, a.total, a.usage, a.score, a.calibration, a.batch)
    deliver.export_run(a.run, a.task, request, a.out, replace=a.replace)
    return 0
