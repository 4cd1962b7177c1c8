"""A low-rank update without the ranks that one task hardly uses, written as an adapter folder.

Of a run on text whose tokens choose blocks of ranks: single ones (SMoRA) or whole LoRAs of a
mixture. They are measured, scored and removed as experts of a decoder are (`pruning`); routers
lose their columns, as the stacked form of an adapter has it. Where a single LoRA is left in a layer
whose weight is always the same, the layer is plain LoRA; PEFT reads a folder of such layers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from moezoo.deploy import certificate, deliver, produce
from moezoo.deploy.path import TaskPath
from moezoo.deploy.produce import Produced, Request, TrainedRun
from moezoo.domains.text import paths, pruning
from moezoo.domains.text.adapter import language_run, system_of
from moezoo.domains.text.domain import TextDataConfig
from moezoo.domains.text.paths import RowReader
from moezoo.domains.text.pruning import DecoderCutter, UnprunedDecoder
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted
from moezoo.nn.lowrank import LowRank
from moezoo.nn.rank_blocks import RoutedUpdate, keeps_weights
from moezoo.train.restore import read_config
from moezoo.weights import hf_files, peft


def cutter(folder: Path) -> RankCutter | None:
    """What prunes the updates of a run on text whose tokens choose among ranks; else None.

    Raises UserError where the folder is no run at all.
    """
    if hf_files.holds_model(folder):
        return None
    config: Any = read_config(folder)
    if not isinstance(config.data, TextDataConfig) or config.model.token_choice() is None:
        return None
    return RankCutter(folder)


class RankCutter(DecoderCutter):
    """A run on text whose paths become adapter folders (`deploy.cutter.Cutter`)."""

    def instead(self, task: str | None) -> str:
        """What an export has no place for: text of any length, and a base that stays as it is."""
        prune = f"moezoo prune {self.path} --task {task or 'TASK'} --keep NUMBER --out FOLDER"
        return (
            f"{self.path} is a run on text, which becomes an adapter's folder and no export: "
            f"{prune} writes it with fewer ranks for one task, moezoo adapter {self.path} --out "
            "FOLDER with all of them."
        )

    def unpruned(self, request: Request, task: str) -> UnprunedDecoder:
        """The run's decoder; UserError for what updates have no place for, before it is read."""
        pruning.check_no_lines(self.path, self.lines)
        config: Any = read_config(self.path)
        if request.weights != "float32":
            raise UserError("An adapter's folder has weights in float32: leave out --weights.")
        if request.recover == "finetune":
            raise UserError(
                "--recover finetune would change the frozen decoder, which an adapter's folder "
                "does not hold: take router or progressive."
            )
        decoder = config.model.decoder
        if any(decoder.experts.in_layer(i) for i in range(decoder.depth)):
            raise UserError(
                f"The decoder of {self.path} has experts itself, and one plan cannot cut those and "
                "the ranks of its updates: merge or leave the updates first."
            )
        size = config.model.token_choice()
        if size.experts <= size.chosen:
            raise UserError(
                f"Tokens choose all {size.experts} blocks of ranks of {self.path}: none can go."
            )
        return UnprunedDecoder(decoder, config.data, lambda: language_run(self.path)[0], {}, {})

    def check_keep(self, whole: UnprunedDecoder, request: Request) -> None:
        """UserError for fewer blocks than a token chooses, and more than there are."""
        size = read_config(self.path).model.token_choice()  # type: ignore[attr-defined]
        if request.keep is not None and not size.chosen <= request.keep <= size.experts:
            raise UserError(
                f"--keep is {request.keep}; it must lie between {size.chosen}, which every token "
                f"chooses, and {size.experts}, which there are."
            )

    def trained(self, whole: UnprunedDecoder, task: str, request: Request) -> TrainedRun:
        """As of every decoder; what rows without a violation keep is asked of the routers."""
        made = super().trained(whole, task, request)
        layers = surgery.find(made.subject.model, Adapted).values()
        alike = all(keeps_weights(layer.router) for layer in layers if layer.update.token_choice)
        said = paths.RENORMALISED if alike else paths.SHARES
        return made._replace(subject=replace(made.subject, statements={task: RANKS + said}))

    def write(self, whole: UnprunedDecoder, trained: TrainedRun, made: Produced, out: Path) -> Path:
        """Write the adapter of a path, read it back, and say what it costs."""
        task, model = made.path.task, pruned_decoder(made.path)
        config: Any = read_config(self.path)
        peft.save(out, model, config.start_from, system_of(config.model))
        reader = RowReader(pruned_model(self.path, out), task)
        apart = certificate.apart(reader, made.path, produce.golden_inputs(trained))
        updates = [layer.update for layer in surgery.find(model, Adapted).values()]
        facts = {
            "form": "stacked, with routers" if any(u.router for u in updates) else "LoRA of PEFT",
            "parameters": sum(module.count(module.split(u).params) for u in updates),
            "largest_difference": apart["largest_difference"],
        }
        pruning.add(out, made, facts)
        self.console.table(f"{task} of {trained.name}", ("", ""), deliver.summary(made))
        self.console.say(
            f"{out}: an adapter ({facts['form']}), written, loaded again, logits differ by at most "
            f"{facts['largest_difference']:.1g}"
        )
        return out


RANKS = "Experts are the blocks of ranks that tokens choose among in an update. "


def pruned_decoder(path: TaskPath) -> Any:
    """The decoder of a path of a `RowReader`, whose routed updates have the path's ranks only."""
    reader = path.module(path.weights)
    for name, layer in surgery.find(reader, RoutedUpdate).items():
        surgery.replace(reader, name, layer.pruned(path.layers[name].kept))
    return reader.model


def pruned_model(run: Path, folder: Path) -> Any:
    """A run's decoder with the pruned adapter in a folder in the place of its own updates.

    Raises UserError where the folder is no adapter of this run's decoder.
    """
    model = language_run(run)[0].model
    updates = {path: layer.update for path, layer in surgery.find(model, Adapted).items()}
    for path in updates:
        surgery.replace(model, path, surgery.get(model, path).base)
    for path, factors in peft.read(folder, model).layers.items():
        if path not in updates:
            raise UserError(f"{folder} has an update of {path}, and {run} has none there.")
        update = _update(updates[path], factors)
        surgery.replace(model, path, Adapted(surgery.get(model, path), update))
    return model


def _update(had: LowRank, factors: peft.Factors) -> LowRank:
    """An update like the one that was there, with these ranks and this router."""
    made: dict[str, Any] = {"scale": factors.scale}
    if factors.router:
        count = factors.router["kernel"].shape[1]
        router: Any = had.router.with_columns(range(count))  # type: ignore[union-attr]
        for name, array in factors.router.items():
            getattr(router, name).set_value(jnp.asarray(array))
        made |= {"experts": count, "router": router}
    (inputs, ranks), outputs = factors.down.shape, factors.up.shape[1]
    update = LowRank(inputs, outputs, ranks, **made, dtype=had.dtype, rngs=nnx.Rngs(0))
    update.down.set_value(jnp.asarray(factors.down))
    update.up.set_value(jnp.asarray(factors.up))
    return update
