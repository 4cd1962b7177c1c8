"""A pretrained Swin transformer's trunk: whether it fits a model, its arrays in our form, and back.

Of these forms: files of timm and of Microsoft's code (.safetensors, .pth), and folders of
transformers. They are told by the names of their arrays, and widths, heads, windows and depths by
their shapes. Where a folder tells how its pixels are normalised, the patches' map is changed so
that it sees the same; a file does not tell: its pixels are normalised as ImageNet's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.backbones.swin import EPSILON, SwinConfig
from moezoo.errors import UserError
from moezoo.schema_check import first_line, list_of, maybe, number, one_of, shortened, table, text
from moezoo.schema_check import whole as whole_number
from moezoo.structured import read_object
from moezoo.weights import files, fold, hf_files, vit_config
from moezoo.weights.files import OpenWeights, check_new, written_whole
from moezoo.weights.fold import Normalisation
from moezoo.weights.hf_vit_names import bare
from moezoo.weights.swin_names import (
    BEYOND,
    CONSTANTS,
    HF_TOLD,
    TIMM_TOLD,
    from_swin,
    to_hf_swin,
)
from moezoo.weights.tensor_file import Planned, write
from moezoo.weights.vit import idle, named
from moezoo.weights.vit_config import CONFIG, PREPROCESSOR
from moezoo.weights.vit_source import FolderWeights

Shape = tuple[int, ...]
KIND, OF_TIMM = "swin", "swin_"
OFFSETS = re.compile(r"stages/(\d+)/blocks/0/attn/offset_bias")
TABLES = re.compile(r".*relative_position_bias_table")
TRANSFORMERS = table(
    {
        "hidden_act": maybe(one_of("gelu")),
        "layer_norm_eps": maybe(number(EPSILON, EPSILON)),
        "num_channels": maybe(one_of(3)),
        "use_absolute_embeddings": maybe(one_of(False)),
        "qkv_bias": maybe(one_of(True)),
        "num_heads": maybe(list_of(whole_number(1, 2**16), longest=100)),
        "architectures": maybe(list_of(text(200), longest=10)),
    }
)


class SwinSource(NamedTuple):
    """Pretrained weights whose arrays are not read yet.

    shapes: of the trunk's parameters by our paths. beyond: names of what is no trunk. unknown:
    names that no line of the tables has. pixels: how it wants them, None where it does not tell.
    """

    path: Path
    weights: OpenWeights
    shapes: Mapping[str, Shape]
    beyond: tuple[str, ...]
    unknown: tuple[str, ...]
    pixels: Normalisation | None


def is_swin(path: Path) -> bool:
    """Whether a folder says that it holds a Swin transformer, or a file's arrays do."""
    if path.is_dir():
        told = hf_files.config_of(path)
        return told.get("model_type") == KIND or str(told.get("architecture")).startswith(OF_TIMM)
    if not path.is_file():
        return False
    names = {bare(name) for name in files.open_file(path).stored}
    return bool({TIMM_TOLD, HF_TOLD} & names) and any(map(TABLES.fullmatch, names))


def source(path: Path) -> SwinSource:
    """What a file or a folder holds, from names and shapes alone.

    Raises UserError where it is missing, cannot be read or computes something else.
    """
    weights = FolderWeights(path) if path.is_dir() else files.open_file(path)
    pixels = _checked(path) if path.is_dir() else None
    names = [name for name in weights.stored if not CONSTANTS.fullmatch(name)]
    beyond = tuple(name for name in names if BEYOND.fullmatch(bare(name)))
    own = [name for name in names if name not in set(beyond)]
    for name in own:
        files.float_type(weights.stored[name], name, path)
    stand_ins = {name: np.broadcast_to(np.int8(0), weights.stored[name].shape) for name in own}
    try:
        found = from_swin(stand_ins)
    except (ValueError, IndexError) as error:
        raise UserError(
            f"'{path}' has arrays of other dimensions than a Swin transformer's "
            f"({first_line(error)}): take another file."
        ) from error
    shapes = {name: tuple(array.shape) for name, array in found.arrays.items()}
    return SwinSource(path, weights, shapes, beyond, tuple(found.unknown), pixels)


def _checked(folder: Path) -> Normalisation | None:
    """What a folder tells of its pixels; UserError where it computes something else than ours."""
    told = hf_files.config_of(folder)
    if "model_type" in told:
        read_object(folder / CONFIG, TRANSFORMERS)
        return vit_config.pixels_of(folder)
    return vit_config.pixels_of_timm(folder)


def options(given: SwinSource) -> dict[str, Any]:
    """Fields of a `SwinConfig` with which it has the weights' sizes, as far as they tell."""
    tables = {int(m[1]): shape for p, shape in given.shapes.items() if (m := OFFSETS.fullmatch(p))}
    blocks = [re.match(r"stages/(\d+)/blocks/(\d+)/", path) for path in given.shapes]
    found = {(int(match[1]), int(match[2])) for match in blocks if match}
    stages = sorted({stage for stage, _ in found})
    patches = given.shapes.get("patch_embed/kernel", (0, 0, 0, 0))
    hidden = given.shapes.get("stages/0/blocks/0/mlp/fc1/kernel", (1, 0))
    return {
        "width": patches[-1],
        "depths": tuple(sum(1 for stage, _ in found if stage == number) for number in stages),
        "heads": tuple(tables[number][-1] for number in stages if number in tables),
        "patch": patches[0],
        "window": max(((math.isqrt(shape[0]) + 1) // 2 for shape in tables.values()), default=0),
        "mlp_ratio": hidden[-1] / max(hidden[0], 1),
    }


def misfits(
    given: SwinSource, wanted: Mapping[str, Shape], without: Sequence[str] = ()
) -> list[str]:
    """Why the trunk cannot be a model's, in clauses; nothing where all of it can.

    wanted: the shapes of the model's trunk by path. without: patterns of paths and names that are
    left out on purpose.
    """
    left = {path: shape for path, shape in given.shapes.items() if not named(path, without)}
    told = [
        f"its {path} is {list(shape)}, the model's {list(wanted[path])}"
        for path, shape in left.items()
        if path in wanted and shape != wanted[path]
    ]
    told += [f"the model has no place for its {path}" for path in left if path not in wanted]
    told += [
        f"it lacks {path}, which the model begins with"
        for path in wanted
        if path not in given.shapes and not named(path, without)
    ]
    told += idle(without, [*given.shapes, *given.unknown, *given.beyond])
    return told + [
        f"it has {shortened(name, 200)}, for which there is no place"
        for name in given.unknown
        if not named(name, without)
    ]


def read(
    given: SwinSource,
    wanted: Mapping[str, Shape],
    pixels: Normalisation,
    without: Sequence[str] = (),
) -> files.Arrays:
    """The trunk's parameters by our paths, float32.

    pixels: what the model will see of them. Raises UserError as `misfits` tells, for damage, and
    for values that are not finite.
    """
    wrong = misfits(given, wanted, without)
    if wrong:
        raise UserError(f"'{given.path}' does not fit the model: {told(wrong)}.")
    apart = {*given.beyond, *given.unknown}
    names = [n for n in given.weights.stored if n not in apart and not CONSTANTS.fullmatch(n)]
    arrays = {name: files.finite(given.weights, name) for name in names}
    found = {p: array for p, array in from_swin(arrays).arrays.items() if not named(p, without)}
    if given.pixels is not None and "patch_embed/kernel" in found:
        found = fold.inputs(found, given.pixels, pixels)
    return found


def told(wrong: Sequence[str]) -> str:
    """Reasons in one clause."""
    return "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if wrong[4:] else "")


def save(
    folder: Path | str,
    config: SwinConfig,
    trunk: Mapping[str, np.ndarray],
    image: int,
    pixels: Normalisation,
) -> None:
    """Write a folder from which transformers builds the same `SwinModel`, float32.

    trunk: by our paths, without heads. image: side of the images. pixels: what the model sees of
    them. The folder appears whole under its name, or not at all. Raises UserError where it exists,
    a stage's windows are smaller than the others', or a path has no name there.
    """
    folder = Path(folder)
    check_new(folder)
    arrays, unknown = to_hf_swin(trunk)
    if unknown:
        raise UserError(f"{sorted(unknown)[0]} has no name in transformers' {KIND}: leave it out.")
    smaller = [w for w in config.windows((image, image)) if w != config.window]
    if smaller:
        raise UserError(
            f"A stage has windows of {smaller[0]}, but transformers' {KIND} has one size for all, "
            f"{config.window}: its images must be so large that every stage has such windows."
        )
    planned = {
        name: Planned(array.shape, np.dtype(np.float32), lambda a=array: np.asarray(a, np.float32))
        for name, array in arrays.items()
    }
    with written_whole(folder) as temporary:
        write(temporary / hf_files.ONE, planned)
        texts = {CONFIG: _config(config, image), PREPROCESSOR: vit_config.images(image, pixels)}
        for name, content in texts.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(config: SwinConfig, image: int) -> dict[str, Any]:
    return {
        "architectures": ["SwinModel"],
        "model_type": KIND,
        "embed_dim": config.width,
        "depths": list(config.depths),
        "num_heads": list(config.heads),
        "window_size": config.window,
        "mlp_ratio": config.mlp_ratio,
        "image_size": image,
        "patch_size": config.patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": EPSILON,
        "qkv_bias": True,
        "use_absolute_embeddings": False,
        "torch_dtype": "float32",
    }
