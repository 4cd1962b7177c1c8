"""What a run on text gives away: its adapter, or its decoder with the adapter merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.adapted import Adapted, fold
from moezoo.train.domain import Text, of
from moezoo.train.restore import read_config
from moezoo.train.setup import load_run
from moezoo.weights import hf, peft


def write_adapter(run: Path, out: Path) -> str:
    """The updates of a run's newest sound checkpoint as an adapter folder; what was written.

    Raises UserError where the run is none on text, has no updates, or `out` cannot be written.
    """
    model = _model(run)
    peft.save(out, model, read_config(run).start_from)
    layers = surgery.find(model, Adapted)
    routed = any(layer.router is not None for layer in layers.values())
    kind = "in stacked form, with its routers" if routed else "that PEFT reads"
    return f"Wrote an adapter of {len(layers)} layers {kind}, to {out}."


def write_merged(run: Path, out: Path) -> str:
    """The decoder with the updates added to its matrices, as a Hugging Face folder.

    Raises UserError where tokens decide, so that no single matrix is the layer, and as above.
    """
    model = _model(run)
    fold(model)
    parts = module.split(model)
    hf.save(out, model.config, parts.params | parts.stats)
    count = module.count(parts.params | parts.stats)
    return f"Wrote the merged decoder, {count:,} parameters, to {out}."


def _model(run: Path) -> Any:
    config = read_config(run)
    if not isinstance(of(config), Text):
        raise UserError(f"{run} is a run on images; tools/export.py writes its exports.")
    return load_run(run).model
