"""Folders written from a run on text: its adapter, or its decoder with the adapter merged.

A merged decoder gets the files of a tokenizer, like the folders of Hugging Face models. A decoder
that was trained on bytes gets a tokenizer of bytes: byte-pair encoding without any pairs, whose 256
letters are the ones that GPT-2's tokenizer writes for bytes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from moezoo import regular
from moezoo.domains.text.data.encode import ends
from moezoo.domains.text.data.tokenizer import AGAIN, LARGEST, ByteTokenizer, Tokenizer
from moezoo.domains.text.domain import TEMPLATES, TextDataConfig, task_number, tokenizer_of
from moezoo.domains.text.tasks import LM
from moezoo.errors import UserError
from moezoo.nn import module, surgery
from moezoo.nn.injection import Adapted, fold
from moezoo.train.domain import Classes
from moezoo.train.restore import read_config
from moezoo.train.setup import Loaded, load_run
from moezoo.weights import hf, hf_files, hub, peft
from moezoo.weights.files import check_new

NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
NAMES += ("chat_template.jinja",)
GENERATION = "generation_config.json"
TEMPLATE = "moezoo_template"  # in config.json: how texts were written when a run was trained
ENTRIES = ("bos_token_id", "eos_token_id", "pad_token_id", TEMPLATE)  # of config.json
# A text that contains one of these words is read as the mark itself, as in every such tokenizer.
MARKS = {"pad_token": "<|pad|>", "bos_token": "<|begin|>", "eos_token": "<|end|>"}


def tokenizer_files(data: TextDataConfig) -> dict[str, bytes]:
    """The files of the run's tokenizer, by name: copies, or a tokenizer of bytes.

    Raises UserError if a file of the run's own tokenizer cannot be read.
    """
    if not data.tokenizer:
        files = {"tokenizer.json": _bytes(), "tokenizer_config.json": _config()}
        return {name: json.dumps(value, indent=1).encode() for name, value in files.items()}
    folder = Path(data.tokenizer).expanduser()
    there = [folder / name for name in NAMES if os.path.lexists(folder / name)]
    return {path.name: regular.read(path, LARGEST, UserError, AGAIN) for path in there}


def letters() -> list[str]:
    """A letter for each byte: itself if printable, else one from U+0100 on, as in GPT-2."""
    printed = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    given = {byte: chr(byte) for byte in printed}
    given |= {byte: chr(0x100 + place) for place, byte in enumerate(others)}
    return [given[byte] for byte in range(256)]


def _bytes() -> dict[str, Any]:
    ids = {name: getattr(ByteTokenizer, name.removesuffix("_token")) for name in MARKS}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": ids[n], "content": mark, **plain, "special": True} for n, mark in MARKS.items()]
    begin = MARKS["bos_token"]
    first: list[dict[str, Any]] = [{"SpecialToken": {"id": begin, "type_id": 0}}]
    texts: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    model |= {"vocab": {letter: byte for byte, letter in enumerate(letters())}, "merges": []}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first + texts[:1],
            "pair": first + texts,
            "special_tokens": {begin: {"id": begin, "ids": [ids["bos_token"]], "tokens": [begin]}},
        },
        "decoder": {**level, "use_regex": False},
        "model": model,
    }


def _config() -> dict[str, Any]:
    tidy = {"clean_up_tokenization_spaces": False, "add_bos_token": True}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **MARKS, **tidy}


def system_of(model: Any) -> dict[str, Any]:
    """The options of a system with which its updates were trained, for the stacked form."""
    return {"name": type(model).__name__} | dataclasses.asdict(model)


def write_adapter(run: Path, out: Path) -> str:
    """Write the updates of a run's newest undamaged checkpoint as an adapter folder; say what.

    Raises UserError if the run is not on text, has no updates, `out` cannot be written, or a router
    has no form in such a folder (`peft.save`).
    """
    check_new(out)
    model, _ = language_model(run)
    config: Any = read_config(run)
    peft.save(out, model, config.start_from, system_of(config.model))
    layers = surgery.find(model, Adapted)
    routed = any(layer.router is not None for layer in layers.values())
    kind = "in stacked form, with its routers" if routed else "that PEFT reads"
    said = f"Wrote an adapter of {len(layers)} layers {kind}, to {out}."
    if not routed:
        return said
    said += " PEFT has no such form: moezoo.weights.peft.read gives its arrays to programs of yours"
    return f"{said}, and moezoo generate {run} asks the run itself."


def write_merged(run: Path, out: Path, task: str | None = None) -> str:
    """Write the decoder, updates added to its matrices, and its tokenizer as a Hugging Face folder.

    task: which of its data's tasks the decoder is for, where tasks decide what is added.
    Raises UserError for another task, if routing depends on tokens, so that no matrix is the layer,
    and as above.
    """
    check_new(out)
    model, data = language_model(run)
    number = None if task is None else task_number(task, data)
    if task is not None and not surgery.find(model, Adapted):
        raise UserError(f"{run} has no updates, so none for task {task}: leave --task out.")
    fold(model, number)
    parts = module.split(model)
    more, files = trained_beside(data)
    hf.save(out, model.config, parts.params | parts.stats, more=more, files=files)
    count = module.count(parts.params | parts.stats)
    return f"Wrote the merged decoder, {count:,} parameters, and its tokenizer to {out}."


class BesideArrays(NamedTuple):
    """What a Hugging Face folder has besides a decoder's arrays (`hf.save`): entries of config.json
    for the tokens that begin and end, and files of the tokenizer."""

    more: dict[str, Any]
    files: dict[str, bytes]


def trained_beside(data: TextDataConfig) -> BesideArrays:
    """Of a decoder that was trained on this data; UserError where a file cannot be read."""
    # Without its template, prompts of the folder would be others than those of the run.
    more = begin_and_end(data, tokenizer_of(data)) | {TEMPLATE: data.template}
    return BesideArrays(more, tokenizer_files(data))


def published_beside(folder: Path) -> BesideArrays:
    """What a Hugging Face folder itself has; UserError where a file cannot be read."""
    told = hf_files.config_of(folder)
    entries = {name: told[name] for name in ENTRIES if told.get(name) is not None}
    there = [folder / name for name in NAMES if os.path.lexists(folder / name)]
    files = {path.name: regular.read(path, LARGEST, UserError, AGAIN) for path in there}
    if (folder / GENERATION).is_file():
        content = regular.read(folder / GENERATION, regular.MB, UserError, "download it again")
        files |= {GENERATION: content}
    return BesideArrays(entries, files)


def write_folded(base: Path, model: Any, out: Path) -> str:
    """Write a decoder whose updates are constant, added to its matrices, as a Hugging Face folder.

    base: the run or Hugging Face folder of the bare decoder, which has the tokenizer. The model's
    layers are replaced. Raises UserError where routing depends on tokens, or `out` exists.
    """
    check_new(out)
    base = hub.folder(base)
    if hf_files.holds_model(base):
        beside = published_beside(base)
    else:
        beside = trained_beside(language_data(base))
    fold(model)
    parts = module.split(model)
    arrays = module.unflatten(module.flatten(parts.params) | module.flatten(parts.stats))
    hf.save(out, model.config, arrays, more=beside.more, files=beside.files)
    return f"Wrote the merged decoder, {module.count(arrays):,} parameters, to {out}."


def begin_and_end(data: TextDataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The config.json entries for the tokens that begin a text and end an answer of this template.

    If they are missing, transformers uses those of its own Llama.
    """
    stop = ends(TEMPLATES[data.template], tokenizer)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": list(stop) if stop[1:] else stop[0]}


def language_model(run: Path) -> tuple[Any, TextDataConfig]:
    """The decoder of a run's newest undamaged checkpoint, and how the run turned text into tokens.

    The run's data may be gone. Raises UserError if the run is not on text.
    """
    loaded, data = language_run(run)
    return loaded.model, data


def language_run(run: Path) -> tuple[Loaded, TextDataConfig]:
    """As `language_model`, with the run's configuration, step and tasks."""
    data = language_data(run)
    # Task names matter only to scores.
    classes = Classes({LM: tokenizer_of(data).vocabulary}, {LM: (LM,)}, (LM,))
    return load_run(run, classes), data


def language_data(run: Path) -> TextDataConfig:
    """The data section of a run on text; UserError for a run on anything else."""
    data = read_config(run).data
    if not isinstance(data, TextDataConfig):
        on = data.domain.name
        raise UserError(f"{run} is a run on {on}, but this works on text only: name another run.")
    return data
