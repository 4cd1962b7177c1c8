"""AST in the folders of Hugging Face models: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moezoo.backbones.ast import AST, ASTConfig
from moezoo.backbones.ast_names import HEAD, PREFIX, from_transformers
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.schema_check import (
    Unfit,
    first_line,
    flag,
    list_of,
    maybe,
    number,
    shortened,
    shown,
    table,
    text,
    whole,
)
from moezoo.structured import read_object
from moezoo.weights import ast_preprocessor, fold
from moezoo.weights.fold import Inputs
from moezoo.weights.hf_config import FOLDER
from moezoo.weights.hf_files import model_type, tensor_files

KIND = "audio-spectrogram-transformer"
# Their names -> our fields, with the defaults of their configuration class.
FIELDS: dict[str, tuple[str, int]] = {
    "max_length": ("frames", 1024),
    "num_mel_bins": ("mel", 128),
    "patch_size": ("patch", 16),
    "time_stride": ("stride_time", 10),
    "frequency_stride": ("stride_freq", 10),
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("heads", 12),
    "intermediate_size": ("hidden", 3072),
}


def _side(value: Any, place: str) -> None:
    """Of a square patch, which may be spelled out."""
    if not isinstance(value, list):
        return SIZE(value, place)
    list_of(SIZE, 2, 2)(value, place)
    if value[0] != value[1]:
        raise Unfit(f"{place} is {shown(value)}, it must be a square")


SIZE = whole(1, 2**20)
CONFIG = table(
    {name: maybe(SIZE) for name in FIELDS}
    | {
        "num_hidden_layers": maybe(whole(1, 1000)),
        "patch_size": maybe(_side),
        "hidden_act": maybe(text(100)),
        "layer_norm_eps": number(0, 1),
        "qkv_bias": flag,
    }
)


def is_ast(folder: Path | str) -> bool:
    """Whether a folder's `config.json` is that of an AST."""
    return model_type(folder) == KIND


def read_config(folder: Path | str, **changes: Any) -> ASTConfig:
    """The sizes of the AST in a folder; `changes` are fields of `ASTConfig`, such as dtype.

    Raises UserError naming what is missing, malformed or not supported.
    """
    path = Path(folder) / "config.json"
    values = read_object(path, absent=FOLDER)
    if values.get("model_type") != KIND:
        raise UserError(
            f"{path} has model_type {shown(values.get('model_type'))}, where an AST has '{KIND}': "
            "name another folder."
        )
    read_object(path, CONFIG)
    if values.get("hidden_act") not in ("gelu", None):
        raise UserError(
            f"{path}: hidden_act is {shown(values['hidden_act'])}; only 'gelu' can be loaded."
        )
    fields: dict[str, Any] = {ours: _number(values, theirs) for theirs, (ours, _) in FIELDS.items()}
    fields |= {
        "norm_epsilon": float(values.get("layer_norm_eps", 1e-12)),
        "qkv_bias": values.get("qkv_bias", True),
    }
    try:
        return ASTConfig(**(fields | changes))
    except UserError as error:  # sizes that do not go together
        raise UserError(f"{path}: {error}") from error


def _number(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    value = FIELDS[name][1] if value is None else value
    return value[0] if isinstance(value, list) else value


def check_fits(folder: Path | str, config: ASTConfig) -> None:
    """UserError where the AST in a folder computes something else than `config`'s."""
    theirs = read_config(folder, dtype=config.dtype)
    for name in ASTConfig.__dataclass_fields__:
        if name == "init_std":  # of what is about to be replaced
            continue
        if getattr(config, name) != getattr(theirs, name):
            raise UserError(
                f"model.ast.{name} is {getattr(config, name)}, but the model in {folder} has "
                f"{getattr(theirs, name)}: take its value, or another folder."
            )


def check(folder: Path | str) -> None:
    """UserError, as of `load`, from names and shapes alone: nothing is read."""
    config, files = read_config(folder), tensor_files(folder)
    shapes = {name: file.entries[name].shape for name, file in files.items()}
    _translated(folder, {n: np.broadcast_to(np.int8(0), s) for n, s in shapes.items()}, config)
    for name, file in files.items():
        if not name.removeprefix(PREFIX).startswith(HEAD):
            file.check_type(name)


def load(folder: Path | str, ours: Inputs | None = None) -> dict[str, np.ndarray]:
    """Every array of an AST's trunk by our paths, float32; its classifier stays behind.

    ours: what the model will see of log-mel features; where its folder has a preprocessor that
    normalises them otherwise, the patches' map is changed so that it sees the same.
    Raises UserError where a file or an array is missing or damaged, or an array has no place.
    """
    check(folder)
    config, files = read_config(folder), tensor_files(folder)
    names = [name for name in files if not name.removeprefix(PREFIX).startswith(HEAD)]
    stored = {n: files[n].read(n, lambda a: np.array(a, np.float32)) for n in names}
    found = _translated(folder, stored, config)
    for path, array in found.items():
        if not np.isfinite(array).all():
            raise UserError(
                f"{folder} has values in {path} that are not finite; download it again."
            )
    theirs = ast_preprocessor.read_preprocessor(folder)
    return found if theirs is None or ours is None else fold.inputs(found, theirs, ours)


def _translated(
    folder: Path | str, stored: Mapping[str, np.ndarray], config: ASTConfig
) -> dict[str, np.ndarray]:
    """Arrays by our paths, which are those of the configuration, no more and no fewer."""
    try:
        translated = from_transformers(stored)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"{folder} has arrays of other dimensions than an AST's ({first_line(error)}): it is "
            "another model."
        ) from error
    if translated.unknown:
        raise UserError(
            f"{folder} has {shortened(translated.unknown[0], 200)}, for which an AST has no place"
            f"{f' (and {len(translated.unknown) - 1} more)' if translated.unknown[1:] else ''}: it "
            "is another model."
        )
    _check_arrays(translated.arrays, config, folder)
    return translated.arrays


def _check_arrays(found: Mapping[str, np.ndarray], config: ASTConfig, folder: Path | str) -> None:
    there = {path.split("/")[1] for path in found if path.startswith("blocks/")}
    if len(there) < config.depth:  # before so many are built in vain
        raise UserError(
            f"{folder} lacks blocks/{len(there)}, which its config.json asks for: the file is "
            "incomplete."
        )
    wanted = shapes(config)
    for path, shape in wanted.items():
        if path not in found:
            raise UserError(
                f"{folder} lacks {path}, which its config.json asks for: the file is incomplete."
            )
        if found[path].shape != shape:
            raise UserError(
                f"{folder} has {path} of {list(found[path].shape)}, but its config.json asks for "
                f"{list(shape)}: take both from the same model."
            )
    for path in found:
        if path not in wanted:
            raise UserError(f"{folder} has {path}, which its config.json does not ask for.")


def shapes(config: ASTConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of an AST, by path."""
    parts = module.abstract(lambda: AST(config, rngs=nnx.Rngs(0)))
    return {path: tuple(leaf.shape) for path, leaf in module.flatten(parts.params).items()}
