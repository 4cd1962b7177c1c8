"""What a run on text gives away: its adapter, or its decoder with the adapter merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.data.text.config import TEMPLATES, TextDataConfig, tokenizer_of
from moezoo.data.text.encode import ends
from moezoo.data.text.tokenizer import Tokenizer
from moezoo.data.text.tokenizer_files import tokenizer_files
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.adapted import Adapted, fold
from moezoo.train import domain
from moezoo.train.domain import LM
from moezoo.train.restore import read_config
from moezoo.train.setup import load_run
from moezoo.weights import hf, peft
from moezoo.weights.folders import check_new


def write_adapter(run: Path, out: Path) -> str:
    """The updates of a run's newest sound checkpoint as an adapter folder; what was written.

    Raises UserError where the run is none on text, has no updates, or `out` cannot be written.
    """
    check_new(out)
    model, _ = language_model(run)
    peft.save(out, model, read_config(run).start_from)
    layers = surgery.find(model, Adapted)
    routed = any(layer.router is not None for layer in layers.values())
    kind = "in stacked form, with its routers" if routed else "that PEFT reads"
    return f"Wrote an adapter of {len(layers)} layers {kind}, to {out}."


def write_merged(run: Path, out: Path) -> str:
    """The decoder with the updates added to its matrices, and its tokenizer: a Hugging Face folder.

    Raises UserError where tokens decide, so that no single matrix is the layer, and as above.
    """
    check_new(out)
    model, data = language_model(run)
    fold(model)
    parts = module.split(model)
    hf.save(
        out,
        model.config,
        parts.params | parts.stats,
        more=begin_and_end(data, tokenizer_of(data)),
        files=tokenizer_files(data),
    )
    count = module.count(parts.params | parts.stats)
    return f"Wrote the merged decoder, {count:,} parameters, and its tokenizer to {out}."


def begin_and_end(data: TextDataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a config.json says of the tokens that begin a text and end an answer of this template.

    Where they are not written, transformers takes those of its own Llama.
    """
    stop = ends(TEMPLATES[data.template], tokenizer)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": list(stop) if stop[1:] else stop[0]}


def language_model(run: Path) -> tuple[Any, TextDataConfig]:
    """The decoder of a run's newest sound checkpoint, and how the run made tokens of text.

    The run's data need not be there any more. Raises UserError where the run is none on text.
    """
    config = read_config(run)
    data = config.data
    if not isinstance(data, TextDataConfig):
        kind = domain.of(config).kind
        raise UserError(f"{run} is a run on {kind}, and this works on text only: name another run.")
    # Names of tasks matter to scores only.
    return load_run(run, {LM: tokenizer_of(data).vocabulary}, {LM: ("lm",)}).model, data
