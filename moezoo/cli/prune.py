"""Cut one task out of a run and remove experts it hardly uses.

Example: moezoo prune runs/m3vit_tiny --task depth --keep 4 --out exports/depth4
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from moezoo.command import WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError


@dataclass(frozen=True)
class PruneCommand:
    """Cut one task out of a run, remove experts, measure what was lost, export the result.

    The folder is an export like the one that moezoo export writes, with the plan, the
    calibration and pictures beside it. Of a decoder, a Hugging Face folder or a run on text, it is
    a Hugging Face folder again, with the certificate, the plan and the calibration beside it.

    Example: moezoo prune runs/m3vit_tiny --task depth --keep 4 --out exports/depth4

    Example: moezoo prune Mixtral-8x7B --task sums --keep 4 --train-file sums.jsonl --test-file
    more_sums.jsonl --out mixtral_for_sums
    """

    run: Annotated[Path, Positional, WITH_WEIGHTS]
    """Folder of a run, a checkpoint, a saved model or a Hugging Face decoder with experts, or the
    name of a model with weights."""
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
    """Replace an export that is already in the folder; a decoder's folder must not exist."""
    train_file: Path | None = None
    """For a Hugging Face decoder: JSON lines whose examples of the task decide which experts
    stay."""
    test_file: Path | None = None
    """For a Hugging Face decoder: JSON lines that the certificate is measured on."""
    length: int | None = None
    """For a Hugging Face decoder: tokens of the longest row; default: 512."""
    template: Literal["plain", "chatml"] | None = None
    """For a Hugging Face decoder: how instructions and chats become text; default: plain."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """For a Hugging Face decoder: type of parameters and computation; default: float32."""


def main(words: list[str], prog: str) -> int:
    """Calibrate, cut out the task, certify it, write the export."""
    from moezoo.deploy import deliver
    from moezoo.deploy.produce import Request
    from moezoo.domains.text import pruning
    from moezoo.domains.text.pruning import Lines
    from moezoo.weights import hub

    a = parse(PruneCommand, words, prog)
    if (a.keep, a.total, a.usage) == (None, None, None):
        raise UserError(
            "Say how many experts stay: --keep (per layer), --total (all layers) or --usage."
        )
    request = Request(a.keep, a.total, a.usage, a.score, a.calibration, a.batch)
    lines = Lines(a.train_file, a.test_file, a.length, a.template, a.dtype)
    folder = hub.folder(a.run)
    if pruning.is_decoder(folder):
        if a.replace:
            raise UserError("A decoder's folder is never replaced: leave out --replace.")
        pruning.prune_decoder(folder, a.task, request, a.out, lines)
        return 0
    if lines.given:
        raise UserError(
            f"--{lines.given[0].replace('_', '-')} is for a Hugging Face decoder, and {a.run} is a "
            "run: leave it out."
        )
    deliver.export_run(a.run, a.task, request, a.out, replace=a.replace)
    return 0
