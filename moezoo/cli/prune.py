"""Cut one task out of a run and remove experts it hardly uses.

Example: moezoo prune runs/m3vit_tiny --task depth --keep 4 --out exports/depth4
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from moezoo.command import ANYWHERE, WITH_WEIGHTS, Positional, parse
from moezoo.errors import UserError

if TYPE_CHECKING:
    from moezoo.deploy.produce import Request
    from moezoo.deploy.sweep import Limits


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
    out: Annotated[Path, ANYWHERE]
    """Folder to write."""
    task: str | None = None
    """The task to keep; in a sweep all of them by default."""
    keep: int | None = None
    """Experts to keep in every MoE layer."""
    total: int | None = None
    """Instead: experts to keep over all layers; layers that matter more keep more."""
    usage: float | None = None
    """Instead: keep the experts whose share of the task's choices is above this percentage
    divided by k (Mod-Squad's rule)."""
    parameters: int | None = None
    """Instead: scalars that the path may have in all."""
    bytes: int | None = None
    """Instead: bytes that the path's weights may take in all."""
    flops: int | None = None
    """Instead: floating-point operations that an example may cost on average."""
    score: Literal[
        "reap",
        "reap_mean",
        "mone",
        "gram",
        "residual",
        "gate_sum",
        "importance",
        "frequency",
        "random",
    ] = "reap"
    """How an expert's worth is measured: reap is the sum of weight times output norm, reap_mean
    (as published) its mean, mone the deviation of outputs times the mean weight, gram and residual
    the exact error of the layer, importance NLLB's."""
    novice: str | None = None
    """What answers for a removed expert: mean (its mean output, the default) or affine:r (a map of
    rank r)."""
    router: Literal["whole", "cut"] | None = None
    """Whether routers keep the columns of removed experts (whole, the default where the format has
    a place for novices) or lose them (cut: tokens choose among the rest)."""
    recover: Literal["none", "progressive", "router", "finetune"] = "none"
    """What is done after experts were removed: progressive measures each layer's stand-ins behind
    the layers that have lost theirs, router trains the routers to give the full model's logits,
    finetune trains weights on labels while experts leave in stages; in a sweep all three are shown
    at half and a quarter of the experts."""
    recover_steps: int | None = None
    """Training steps of router and finetune, on the calibration examples; default: 300."""
    recover_lr: float | None = None
    """Their learning rate at the start; default: 0.001."""
    recover_trains: Literal["small", "all"] | None = None
    """What finetune moves: the head and all that is no matrix (norms, biases), which is the
    default, or all weights."""
    sweep: bool = False
    """Instead of an export, write the trade-off curve: every number of experts per layer, by this
    score and by the published ones."""
    max_loss: str | None = None
    """Instead of a budget: the fewest experts per layer with which the task's metric loses at most
    this share (1%), by a 95 % bound on verification examples."""
    max_disagreement: str | None = None
    """The same for the share of examples whose prediction differs by more than 5 % or degrees."""
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
    from moezoo import storage
    from moezoo.deploy.cutter import cutter_of
    from moezoo.deploy.produce import Request
    from moezoo.deploy.sweep import Limits, share
    from moezoo.train import zoo
    from moezoo.weights import hub

    a = parse(PruneCommand, words, prog)
    request = Request(**{f.name: getattr(a, f.name) for f in fields(Request)})
    limits = Limits(
        None if a.max_loss is None else share(a.max_loss, "--max-loss"),
        None if a.max_disagreement is None else share(a.max_disagreement, "--max-disagreement"),
    )
    _check(a, request, limits)
    # A decoder in a store is read from a copy on this disk, a run where it is.
    folder = zoo.located(a.run) if storage.is_stored(a.run) else hub.folder(a.run)
    cutter = cutter_of(a.run, folder)
    options = {name: value for name in FOLDERS if (value := getattr(a, name)) is not None}
    cutter.check(options, a.replace, a.formats)
    if a.sweep:
        cutter.sweep(a.task, request, a.out)
    elif limits.given:
        cutter.within(a.task or "", request, limits, a.out)
    else:
        cutter.export(a.task or "", request, a.out)
    return 0


# Options about models that are no runs, whose data and types nothing else says.
FOLDERS = ("train_file", "test_file", "length", "template", "dtype")


def _check(a: PruneCommand, request: Request, limits: Limits) -> None:
    """UserError for options that make no sense together."""
    if a.task is None and not a.sweep:
        raise UserError("Say which task stays: --task NAME (a sweep alone takes all of them).")
    if a.sweep and limits.given:
        raise UserError(
            "--sweep shows every number of experts, --max-loss and --max-disagreement choose one: "
            "leave one of the two out."
        )
    if a.sweep and (a.formats or a.weights != "float32"):
        raise UserError("--sweep writes no export: leave out --formats and --weights.")
    if not a.sweep:
        _ = request.recovery  # whose options must be of use
    if limits.given and request.recover != "none":
        raise UserError(
            "--max-loss and --max-disagreement choose among paths as they are: leave out --recover."
        )
    if request.whole and not a.sweep and not limits.given:
        raise UserError(
            "Say how much stays: --keep (experts per layer), --total (experts of all layers), "
            "--usage, --parameters, --bytes, --flops, --max-loss or --max-disagreement."
        )
