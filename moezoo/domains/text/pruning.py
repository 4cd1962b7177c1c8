"""A decoder without the experts that one task hardly uses, written as a Hugging Face folder.

Of a Hugging Face folder with JSON lines, or of a run on text. Files of these families have the same
number of experts in every layer and no place for what `deploy.pruned` puts in the place of removed
ones: routers lose their columns, and tokens choose among the rest. What that changes is measured
and certified as for every other path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax import Array

from moezoo.backbones.decoder import DecoderConfig, Float
from moezoo.backbones.decoder_mlp import ExpertsConfig
from moezoo.deploy import certificate, deliver, export, produce, splits
from moezoo.deploy.path import TaskPath
from moezoo.deploy.produce import Produced, Request, TrainedRun
from moezoo.deploy.sweep import Curve, Limits
from moezoo.domains.text.adapter import language_run, published_beside, trained_beside
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.paths import RowPaths, RowReader
from moezoo.domains.text.pretrained import Decoders
from moezoo.errors import UserError
from moezoo.files import write_atomically
from moezoo.json_text import json_text
from moezoo.nn import module
from moezoo.nn.injection import fold
from moezoo.train.console import Console
from moezoo.train.domain import Classes
from moezoo.train.restore import read_config
from moezoo.train.setup import Loaded
from moezoo.weights import hf, hf_files
from moezoo.weights.files import check_new

PREFIX = "model/"  # of a decoder's paths in a `RowReader`


@dataclass(frozen=True)
class Lines:
    """What a Hugging Face folder is calibrated and measured on, and the type it computes in.

    train_file: JSON lines that decide which experts stay. test_file: those that the certificate is
    measured on. length, template: as in `TextDataConfig`.
    """

    train_file: Path | None = None
    test_file: Path | None = None
    length: int | None = None
    template: str | None = None
    dtype: Float | None = None

    @property
    def given(self) -> list[str]:
        """The options that were given."""
        return [name for name, value in vars(self).items() if value is not None]

    def data(self, folder: Path) -> TextDataConfig:
        """The data section that says the same, with the folder's tokenizer."""
        if self.train_file is None or self.test_file is None:
            raise UserError(
                f"{folder} is a model without data: give JSON lines of the task, --train-file for "
                "calibration and --test-file for the certificate."
            )
        return TextDataConfig(
            name="jsonl",
            length=self.length or 512,
            train_file=str(self.train_file),
            test_file=str(self.test_file),
            tokenizer=str(folder),
            template=self.template or "plain",  # type: ignore[arg-type]
            arrangement="padded",
        )


@dataclass(frozen=True, eq=False)
class UnprunedDecoder:
    """A decoder to prune, its data, and what its folder needs besides its arrays.

    load: reads the arrays.   more, files: as for `hf.save`.
    """

    config: DecoderConfig
    data: TextDataConfig
    load: Callable[[], Loaded]
    more: Mapping[str, Any]
    files: Mapping[str, bytes]


def cutter(folder: Path) -> DecoderCutter | None:
    """What prunes the folder of a Hugging Face model, or of a run on text; None for another run.

    Raises UserError where it is neither and no run at all.
    """
    own = hf_files.holds_model(folder) or isinstance(read_config(folder).data, TextDataConfig)
    return DecoderCutter(folder) if own else None


def open_unpruned(path: Path, lines: Lines) -> UnprunedDecoder:
    """The decoder in a folder of either kind; `lines` are for Hugging Face's only.

    Raises UserError where lines are missing or given for a run.
    """
    if hf_files.holds_model(path):
        return _of_folder(path, lines)
    check_no_lines(path, lines)
    config: Any = read_config(path)
    data: TextDataConfig = config.data
    beside = trained_beside(data)
    return UnprunedDecoder(config.model.decoder, data, lambda: _folded(path), *beside)


def check_no_lines(run: Path, lines: Lines) -> None:
    """UserError for an option of Hugging Face's folders that was given for a run."""
    if lines.given:
        raise UserError(
            f"{run} is a run, which has data and types of its own: leave out "
            f"--{lines.given[0].replace('_', '-')}."
        )


def _of_folder(path: Path, lines: Lines) -> UnprunedDecoder:
    data, dtype = lines.data(path), lines.dtype or "float32"
    types = {"dtype": dtype, "param_dtype": dtype}
    more, files = published_beside(path)

    def load() -> Loaded:
        return Decoders(data).loaded(path, **types)[0]

    return UnprunedDecoder(hf.read_config(path, **types), data, load, more, files)


def _folded(run: Path) -> Loaded:
    """A run's model without adapters; UserError where one cannot be folded into its matrix."""
    loaded, _ = language_run(run)
    fold(loaded.model)
    return loaded


class DecoderCutter:
    """A decoder's folder, or a run on text, whose paths become Hugging Face folders again.

    path: of either kind (`deploy.cutter.Cutter`).   lines: what a folder is measured on.
    """

    def __init__(self, path: Path, lines: Lines = Lines(), console: Console | None = None):
        self.path, self.lines, self.console = path, lines, console or Console()

    def instead(self, task: str | None) -> str:
        """An export's program reads one array and needs no tokenizer: a decoder has none."""
        prune = f"moezoo prune {self.path} --task {task or 'TASK'} --keep NUMBER --out FOLDER"
        if hf_files.holds_model(self.path):
            return (
                f"{self.path} is a Hugging Face model, which stays one: {prune} with --train-file "
                "and --test-file writes it with fewer experts for one task."
            )
        config: Any = read_config(self.path)
        if not has_experts(config.model.decoder):
            return (
                f"{self.path} is a run on text, of which no export is made{merged(self.path, task)}"
            )
        return (
            f"{self.path} is a run on text, which becomes a Hugging Face folder and no export: "
            f"{prune} writes it with fewer experts for one task."
        )

    def check(self, options: Mapping[str, Any], replace: bool, formats: Sequence[str]) -> None:
        """UserError for options that a decoder's folder has no place for."""
        if replace:
            raise UserError("A decoder's folder is never replaced: leave out --replace.")
        if formats:
            raise UserError("A decoder is written as a Hugging Face folder: leave out --formats.")
        self.lines = Lines(**options)

    def export(self, task: str, request: Request, out: Path) -> Path:
        """Write the decoder with `request.keep` experts in every sparse layer, for one task.

        The folder has a certificate, the plan and the calibration besides. Raises UserError for
        anything that stands in the way, before any long work where it can.
        """
        check_new(out)
        whole = self.unpruned(request, task)
        self.check_keep(whole, request)
        trained = self.trained(whole, task, request)
        made = produce.produce(trained, task, request, self.console)
        return self.write(whole, trained, made, out)

    def within(self, task: str, request: Request, limits: Limits, out: Path) -> Path:
        """The same with the fewest experts per layer that keep the limits."""
        check_new(out)
        whole = self.unpruned(request, task)
        trained = self.trained(whole, task, request)
        made = deliver.produce_within(trained, task, request, limits, self.console)
        return self.write(whole, trained, made, out)

    def sweep(self, task: str | None, request: Request, out: Path) -> list[Curve]:
        """Write the trade-off curve of one task: its rows are read from the data by its name."""
        if task is None:
            raise UserError("A sweep of a decoder is about the rows of one task: give --task.")
        export.check_free(out, mark=deliver.CURVE)
        trained = self.trained(self.unpruned(request, task), task, request)
        return deliver.sweep_trained(trained, [task], request, out, self.console)

    def unpruned(self, request: Request, task: str) -> UnprunedDecoder:
        """The decoder; UserError where none of its experts can be removed, before it is read."""
        if request.weights != "float32":
            raise UserError(
                "A decoder is written as a Hugging Face folder: leave out --weights; --dtype is "
                "the type of its parameters."
            )
        whole = open_unpruned(self.path, self.lines)
        _check_experts(self.path, whole.config, task)
        return whole

    def trained(self, whole: UnprunedDecoder, task: str, request: Request) -> TrainedRun:
        """The decoder as something that paths are cut from, and its data, divided."""
        exporter = RowPaths(whole.data, task)
        train, test = exporter.open("train"), exporter.open("test")
        parts = splits.divide(exporter, train, test, request.calibration)
        return _trained(self.path.name, exporter, parts, whole.load())

    def check_keep(self, whole: UnprunedDecoder, request: Request) -> None:
        """UserError for a number of experts that files of this family cannot have."""
        _check_keep(self.path, whole.config.experts, request)

    def write(self, whole: UnprunedDecoder, trained: TrainedRun, made: Produced, out: Path) -> Path:
        """Write the folder of a path, read it back, and say what it costs."""
        task, kept = made.path.task, {len(ids) for ids in made.path.plan.kept.values()}
        (count,) = kept
        config = replace(whole.config, experts=replace(whole.config.experts, count=count))
        flat = decoder_arrays(made.path)
        hf.save(out, config, module.unflatten(flat), more=whole.more, files=whole.files)
        apart = _read_back(out, config, trained, made)
        add(out, made, {"parameters": module.count(flat), "largest_difference": apart})
        self.console.table(f"{task} of {trained.name}", ("", ""), deliver.summary(made))
        self.console.say(f"{out}: written, loaded again, logits differ by at most {apart:.1g}")
        return out


def decoder_arrays(path: TaskPath) -> dict[str, Array]:
    """The arrays of a path of a `RowReader` as those of a decoder by itself, by their paths there.

    Routers lose the columns of removed experts; everything else is the path's own.
    """
    flat = {name.removeprefix(PREFIX): array for name, array in path.weights.items()}
    for name, layer in path.layers.items():
        kept = jnp.asarray(layer.kept, jnp.int32)
        for leaf in ("kernel", "bias"):  # [D, E], and [E] of those that have one
            router = f"{name.removeprefix(PREFIX)}/router/{leaf}"
            if router in flat:
                flat[router] = flat[router][..., kept]
    return flat


def has_experts(config: DecoderConfig) -> bool:
    """Whether a decoder has a layer with experts."""
    return any(config.experts.in_layer(i) for i in range(config.depth))


def merged(run: Path, task: str | None) -> str:
    """The end of a sentence: the command that writes a run's decoder with what it has learned.

    task: the one that was asked for, where the command needs one.
    """
    config: Any = read_config(run)
    needs = config.model.merging()
    if needs is None:
        return f": its parts stay apart, and moezoo generate {run} asks it."
    named = f" --task {task or 'TASK'}" if needs == "task" else ""
    what = "the task's decoder" if named else "its decoder"
    return f"; moezoo adapter {run} --merge{named} --out FOLDER writes {what} as a plain one."


def _check_experts(path: Path, config: DecoderConfig, task: str) -> None:
    """UserError where no expert can be removed that files could say."""
    experts = config.experts
    if not has_experts(config):
        instead = "." if hf_files.holds_model(path) else merged(path, task)
        raise UserError(f"{path} has no experts in any layer: there is nothing to prune{instead}")
    if experts.groups > 1:
        raise UserError(
            f"{path} has its {experts.count} experts in {experts.groups} groups of equal size, of "
            f"which a token sees {experts.top_groups}: without some of them the groups would be "
            "others, so none can be removed."
        )


def _check_keep(path: Path, experts: ExpertsConfig, request: Request) -> None:
    """UserError for a number of experts that files of this family cannot have."""
    if request.keep is None:
        raise UserError(
            "Files of this family have the same number of experts in every layer: give --keep, "
            "not --total or --usage."
        )
    if not experts.top_k <= request.keep <= experts.count:
        raise UserError(
            f"--keep is {request.keep}; it must lie between {experts.top_k}, which every token "
            f"chooses, and {experts.count}, which there are."
        )


def _trained(name: str, exporter: RowPaths, parts: splits.Subsets, loaded: Loaded) -> TrainedRun:
    subject = exporter.subject(loaded, Classes())
    size = (1, exporter.data.length)
    return TrainedRun(name, loaded.config, exporter, subject, size, loaded.step, parts, {})


def _read_back(out: Path, config: DecoderConfig, trained: TrainedRun, made: Produced) -> float:
    """How far the written model's logits are from the path's, on two verification rows."""
    types: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
    reader = RowReader(module.merge(*hf.load(out, **types).parts), made.path.task)
    apart = certificate.apart(reader, made.path, produce.golden_inputs(trained))
    return apart["largest_difference"]


def add(out: Path, made: Produced, folder: Mapping[str, Any]) -> None:
    """What a pruned decoder's folder has besides: certificate, plan, calibration."""
    stated = made.certificate | {"folder": dict(folder)}
    write_atomically(out / "certificate.json", json_text(stated, 1, sort_keys=True))
    write_atomically(out / "plan.json", made.path.plan.to_json() + "\n")
    if made.calibration is not None:
        made.calibration.save(out / "calibration.npz")
