"""AST in the folders of Hugging Face models: configuration, preprocessor and safetensors.

The arrays have names in two spellings: `encoder.layer.0...` in all published files, `layers.0...`
since transformers 5, whose state dictionaries have the names of the modules.

What the model sees of a clip is `ASTFeatureExtractor`'s: log-mel features minus a mean, over two
deviations. Another mean and deviation than AudioSet's are folded into the patches' map; another
rate is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from moezoo.backbones.ast import AST, ASTConfig
from moezoo.errors import UserError
from moezoo.nn import module
from moezoo.schema_check import (
    FormatFault,
    anything,
    first_line,
    flag,
    list_of,
    maybe,
    number,
    one_of,
    refused,
    shortened,
    shown,
    table,
    text,
    whole,
)
from moezoo.structured import read_object
from moezoo.weights import fold
from moezoo.weights.fold import Normalisation
from moezoo.weights.hf_config import FOLDER
from moezoo.weights.hf_files import model_type, tensor_files
from moezoo.weights.hf_vit_names import EMBEDDINGS
from moezoo.weights.names import NameTable, ParameterName, Translated, linear, norm, to_ours

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
SIZE = whole(1, 2**20)


def _side(value: Any, place: str) -> None:
    """Of a square patch, which may be spelled out."""
    if not isinstance(value, list):
        return SIZE(value, place)
    list_of(SIZE, 2, 2)(value, place)
    if value[0] != value[1]:
        raise FormatFault(f"{place} is {shown(value)}, it must be a square")


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


NAME = "preprocessor_config.json"
PREPROCESSOR = "ASTFeatureExtractor"
PREPROCESSOR_FORM = table(
    {
        "feature_extractor_type": maybe(one_of(PREPROCESSOR)),
        "processor_class": maybe(text(200)),
        "mean": number(-1e4, 1e4),
        "std": number(1e-4, 1e4),
        "do_normalize": flag,  # null would be false
        "sampling_rate": maybe(whole(1, 10_000_000)),
        "num_mel_bins": maybe(whole(1, 10_000)),
        "max_length": maybe(whole(1)),
        "feature_size": maybe(one_of(1)),
        # Of waveforms, which the extractor does not pad.
        **dict.fromkeys(("padding_value", "padding_side", "return_attention_mask"), anything),
    },
    others=refused,  # windows, dither and the like would change the features
)
# Of the extractor's class, where a file does not say.
MEAN, STD, RATE, BANDS = -4.2677393, 4.5689974, 16_000, 128


def read_preprocessor(folder: Path | str) -> Normalisation | None:
    """What the model in a folder sees of log-mel features; None where its folder does not tell.

    Raises UserError where the file is damaged or another kind of preprocessor's.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        return None
    values = read_object(path, PREPROCESSOR_FORM)
    if values.get("do_normalize") is False:
        return Normalisation((0.0,), (1.0,))
    return Normalisation((values.get("mean", MEAN),), (2 * values.get("std", STD),))


def check_preprocessor(folder: Path | str, rate: int, bands: int) -> None:
    """UserError where the model in a folder heard clips of another rate, or reads other bands."""
    path = Path(folder) / NAME
    if read_preprocessor(folder) is None:
        return
    values = read_object(path, PREPROCESSOR_FORM)
    own = {"rate": values.get("sampling_rate") or RATE, "mel": values.get("num_mel_bins") or BANDS}
    wrong = {k: v for k, v in own.items() if v != {"rate": rate, "mel": bands}[k]}
    if wrong:
        names = {"rate": "sampling_rate", "mel": "num_mel_bins"}
        told = " and ".join(f"{names[k]} {v}" for k, v in wrong.items())
        options = " ".join(f"--data.{k} {v}" for k, v in wrong.items())
        raise UserError(f"{path} has {told}, the data section another: add {options}.")


PREFIX = "audio_spectrogram_transformer."
HEAD = "classifier."
OURS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/fc1", "mlp/fc2")


def _layers(theirs: str, products: Sequence[str]) -> list[ParameterName]:
    """A layer's linear maps, in the order of `OURS`, and its norms."""
    lines = [
        name
        for ours, their in zip(OURS, products, strict=True)
        for name in linear(f"blocks/{{0}}/{ours}", f"{theirs}.{their}")
    ]
    lines += norm("blocks/{0}/norm1", f"{theirs}.layernorm_before")
    return lines + norm("blocks/{0}/norm2", f"{theirs}.layernorm_after")


_PUBLISHED = [f"attention.attention.{name}" for name in ("query", "key", "value")]
_PUBLISHED += ["attention.output.dense", "intermediate.dense", "output.dense"]
_MODULES = [*(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2"]
AST_NAMES: NameTable = [*EMBEDDINGS, *_layers("encoder.layer.{0}", _PUBLISHED)]
MODULE_NAMES: NameTable = [*EMBEDDINGS, *_layers("layers.{0}", _MODULES)]


def from_transformers(state: Mapping[str, np.ndarray]) -> Translated:
    """Arrays of an `ASTModel` or an `ASTForAudioClassification` under our paths, without its head.

    patch_embed's kernel is [bands, frames, 1, D], linear ones are [in, out].
    """
    own = {name.removeprefix(PREFIX): array for name, array in state.items()}
    trunk = {name: array for name, array in own.items() if not name.startswith(HEAD)}
    modern = any(name.startswith("layers.") for name in trunk)
    return to_ours(trunk, MODULE_NAMES if modern else AST_NAMES)


def check(folder: Path | str) -> None:
    """UserError, as of `load`, from names and shapes alone: nothing is read."""
    config, files = read_config(folder), tensor_files(folder)
    shapes = {name: file.entries[name].shape for name, file in files.items()}
    _translated(folder, {n: np.broadcast_to(np.int8(0), s) for n, s in shapes.items()}, config)
    for name, file in files.items():
        if not name.removeprefix(PREFIX).startswith(HEAD):
            file.check_type(name)


def load(folder: Path | str, ours: Normalisation | None = None) -> dict[str, np.ndarray]:
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
    theirs = read_preprocessor(folder)
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
