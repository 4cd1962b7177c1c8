"""What a run on text gives away: its adapter, or its decoder with the adapter merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.data.text.config import TextDataConfig, tokenizer_of
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.adapted import Adapted, fold
from moezoo.train.domain import LM
from moezoo.train.restore import read_config
from moezoo.train.setup import load_run
from moezoo.weights import hf, peft


def write_adapter(run: Path, out: Path) -> str:
    """The updates of a run's newest sound checkpoint as an adapter folder; what was written.

    Raises UserError where the run is none on text, has no updates, or `out` cannot be written.
    """
    model, _ = language_model(run)
    peft.save(out, model, read_config(run).start_from)
    layers = surgery.find(model, Adapted)
    routed = any(layer.router is not None for layer in layers.values())
    kind = "in stacked form, with its routers" if routed else "that PEFT reads"
    return f"Wrote an adapter of {len(layers)} layers {kind}, to {out}."


def write_merged(run: Path, out: Path) -> str:
    """The decoder with the updates added to its matrices, as a Hugging Face folder.

    Raises UserError where tokens decide, so that no single matrix is the layer, and as above.
    """
    model, _ = language_model(run)
    fold(model)
    parts = module.split(model)
    hf.save(out, model.config, parts.params | parts.stats)
    count = module.count(parts.params | parts.stats)
    return f"Wrote the merged decoder, {count:,} parameters, to {out}."


def language_model(run: Path) -> tuple[Any, TextDataConfig]:
    """The decoder of a run's newest sound checkpoint, and how the run made tokens of text.

    The run's data need not be there any more. Raises UserError where the run is none on text.
    """
    data = read_config(run).data
    if not isinstance(data, TextDataConfig):
        raise UserError(f"{run} is a run on other data than text; tools/export.py writes exports.")
    # Names of tasks matter to scores only.
    return load_run(run, {LM: tokenizer_of(data).vocabulary}, {LM: ("lm",)}).model, data
