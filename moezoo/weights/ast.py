"""AST in the folders of Hugging Face models: `config.json` and `model.safetensors`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moezoo.backbones.ast import AST, ASTConfig
from moezoo.backbones.ast_names import from_transformers
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.weights.hf import tensor_files
from moezoo.weights.hf_config import read_json

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


def is_ast(folder: Path | str) -> bool:
    """Whether a folder's `config.json` is that of an AST."""
    path = Path(folder) / "config.json"
    return path.is_file() and read_json(path).get("model_type") == KIND


def read_config(folder: Path | str, **changes: Any) -> ASTConfig:
    """The sizes of the AST in a folder; `changes` are fields of `ASTConfig`, such as dtype.

    Raises UserError naming what is missing, malformed or not supported.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    if values.get("model_type") != KIND:
        raise UserError(
            f"{path} has model_type {values.get('model_type')!r}, where an AST has '{KIND}': name "
            "another folder."
        )
    if values.get("hidden_act", "gelu") != "gelu":
        raise UserError(
            f"{path}: hidden_act is {values['hidden_act']!r}; only 'gelu' can be loaded."
        )
    fields: dict[str, Any] = {
        ours: _number(values, theirs, path) for theirs, (ours, _) in FIELDS.items()
    }
    epsilon = values.get("layer_norm_eps", 1e-12)
    if not isinstance(epsilon, float | int) or isinstance(epsilon, bool):
        raise UserError(f"{path}: layer_norm_eps is {epsilon!r}, it must be a number.")
    fields |= {"norm_epsilon": float(epsilon), "qkv_bias": bool(values.get("qkv_bias", True))}
    return ASTConfig(**(fields | changes))


def _number(values: Mapping[str, Any], name: str, path: Path) -> int:
    value = values.get(name)
    value = FIELDS[name][1] if value is None else value
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]  # a square patch, spelled out
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path}: {name} is {value!r}, it must be a whole number.")
    return value


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


def load(folder: Path | str) -> dict[str, np.ndarray]:
    """Every array of an AST's trunk by our paths, float32; its classifier stays behind.

    Raises UserError where a file or an array is missing or damaged, or an array has no place.
    """
    config, files = read_config(folder), tensor_files(folder)
    stored = {name: file.read(name, np.array) for name, file in files.items()}
    translated = from_transformers(stored)
    if translated.unknown:
        raise UserError(
            f"{folder} has {translated.unknown[0]}, for which an AST has no place"
            f"{f' (and {len(translated.unknown) - 1} more)' if translated.unknown[1:] else ''}: it "
            "is another model."
        )
    found = {path: np.asarray(a, np.float32) for path, a in translated.arrays.items()}
    _check_arrays(found, config, folder)
    return found


def _check_arrays(found: Mapping[str, np.ndarray], config: ASTConfig, folder: Path | str) -> None:
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
