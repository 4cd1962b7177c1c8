"""The folder of a pretrained vision transformer, without its arrays: heads and the form of pixels.

Read from the folders of transformers (`config.json`, `preprocessor_config.json`) and of timm
(`config.json` with `pretrained_cfg`). A file alone tells neither.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moezoo.errors import UserError
from moezoo.schema_check import (
    anything,
    either,
    flag,
    list_of,
    maybe,
    number,
    one_of,
    refused,
    shown,
    table,
    text,
    whole,
)
from moezoo.structured import read_object
from moezoo.weights.fold import Normalisation

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers")  # of transformers
# Vision transformers of transformers that are known and not read, and why.
REFUSED = {
    "dinov3_vit": "rotates queries and keys by their patches' places and has no learned positions",
    "dinov3_convnext": "is a convolutional network, no vision transformer",
}
ARCHITECTURE = re.compile(r"(vit|deit3?)_(tiny|small|base|large)_.*patch.*")  # of timm
# Words in timm's names for what no array shows.
OTHERS = {
    "dinov3": "rotates queries and keys by their places",
    "rope": "rotates queries and keys by their places",
    "rpn": "has its norms behind attention and MLP",
    "quickgelu": "has another GELU",
}
HEADS = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12), "large": (1024, 16)}
SIDE = either(whole(1, 2**16), list_of(whole(1, 2**16), 2, 2))
MEAN, SPREAD = number(-1e4, 1e4), number(1e-4, 1e4)
COLOURS = either(MEAN, list_of(MEAN, 3, 3))
SPREADS = either(SPREAD, list_of(SPREAD, 3, 3))
TRANSFORMERS = table(
    {
        "model_type": one_of(*TYPES),
        "num_attention_heads": whole(1, 2**16),
        "hidden_size": whole(1, 2**24),
        "num_hidden_layers": whole(1, 1000),
        "hidden_act": maybe(text(100)),
        "layer_norm_eps": maybe(number(0, 1)),
        "num_channels": maybe(one_of(3)),
        "image_size": maybe(SIDE),
        "patch_size": maybe(SIDE),
        "use_swiglu_ffn": maybe(one_of(False)),
        "qkv_bias": maybe(one_of(True)),
    },
    required=("num_attention_heads", "hidden_size"),
)
IMAGES = table(
    {
        "do_normalize": flag, "do_rescale": flag,  # null would be false
        "rescale_factor": maybe(number(1e-6, 1e4)), "offset": maybe(one_of(False)),
        "do_flip_channel_order": maybe(one_of(False)),
        "image_mean": maybe(COLOURS), "image_std": maybe(SPREADS),
    }
)  # fmt: skip
PUBLISHED = table({"mean": maybe(COLOURS), "std": maybe(SPREADS)})
TIMM_PIXELS = table(
    {"pretrained_cfg": maybe(PUBLISHED), "mean": maybe(COLOURS), "std": maybe(SPREADS)}
)
# What changes of timm's named architecture: sizes, and what the arrays show anyway.
CHANGES = table(
    {
        "num_heads": maybe(whole(1, 2**16)), "embed_dim": maybe(whole(1, 2**24)),
        "pos_embed": maybe(one_of("learn")),
        **dict.fromkeys(
            (
                "img_size", "patch_size", "depth", "mlp_ratio", "num_classes", "init_values",
                "qkv_bias", "class_token", "no_embed_class", "reg_tokens", "global_pool", "fc_norm",
                "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
                "attn_drop_rate", "drop_path_rate", "weight_init", "dynamic_img_size",
            ),
            anything,
        ),
    },
    others=refused,
)  # fmt: skip
TIMM = table(
    {
        "architecture": text(200), "pretrained_cfg": maybe(PUBLISHED), "model_args": maybe(CHANGES),
        "mean": maybe(COLOURS), "std": maybe(SPREADS),
    },
    required=("architecture",),
)  # fmt: skip
LARGEST_EPSILON = 1e-5  # ours is 1e-6, theirs 1e-12 to 1e-5: no feature of them shows it


class VitFolder(NamedTuple):
    """What a folder tells; None: it does not.

    grid: patches of the images that its positions are for.
    """

    heads: int | None = None
    grid: tuple[int, int] | None = None
    width: int | None = None
    pixels: Normalisation | None = None


def is_folder_of_vit(folder: Path) -> bool:
    """Whether a folder's `config.json` is that of a vision transformer that is read here."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    values = read_object(path)
    if "model_type" in values:
        return values["model_type"] in TYPES
    named = values.get("architecture")
    return isinstance(named, str) and named.startswith(("vit_", "deit"))


def read_config(folder: Path) -> VitFolder:
    """What a folder tells, nothing where it has no `config.json`.

    Raises UserError where it is another model's than ours can be.
    """
    path = folder / CONFIG
    if not path.exists():
        return VitFolder()
    kind = read_object(path).get("model_type")
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(
            f"{path}: model_type {kind} is not supported, because it {REFUSED[kind]}, which models "
            "here do not: take one of dinov2_with_registers."
        )
    if not is_folder_of_vit(folder):
        raise UserError(
            f"{path} is not that of a vision transformer that is read here (model_type "
            f"{', '.join(TYPES)}, or an architecture of timm that begins with vit_ or deit): move "
            "the weights out of its folder, or take another model."
        )
    if "model_type" not in read_object(path):
        return _of_timm(path)
    values = read_object(path, TRANSFORMERS)
    if values.get("hidden_act") not in ("gelu", None):
        raise UserError(
            f"{path}: hidden_act is {shown(values['hidden_act'])}; only 'gelu' can be loaded."
        )
    if (values.get("layer_norm_eps") or 0) > LARGEST_EPSILON:
        raise UserError(
            f"{path}: layer_norm_eps is {values['layer_norm_eps']}, and at most {LARGEST_EPSILON} "
            "can be, because norms here have 1e-6."
        )
    pixels = pixels_of(folder)
    return VitFolder(values["num_attention_heads"], _grid(values), values["hidden_size"], pixels)


def _grid(values: Mapping[str, Any]) -> tuple[int, int] | None:
    image, patch = values.get("image_size"), values.get("patch_size")
    if image is None or patch is None:
        return None
    height, width = image if isinstance(image, list) else (image, image)
    rows, columns = patch if isinstance(patch, list) else (patch, patch)
    return height // rows, width // columns


def _of_timm(path: Path) -> VitFolder:
    values = read_object(path, TIMM)
    name, changes = values["architecture"].partition(".")[0], values.get("model_args") or {}
    for word in set(name.split("_")) & set(OTHERS):
        raise UserError(
            f"{path}: the architecture {shown(name)} {OTHERS[word]}, which a model here does not: "
            "take another model."
        )
    match = ARCHITECTURE.fullmatch(name)
    width, heads = HEADS[match[2]] if match and not changes and "plus" not in name else (None, None)
    width, heads = changes.get("embed_dim") or width, changes.get("num_heads") or heads
    return VitFolder(heads, None, width, _pixels_told(values))


def pixels_of_timm(folder: Path) -> Normalisation | None:
    """What timm makes of pixels from 0 to 1 for the model in a folder; None: it does not tell."""
    return _pixels_told(read_object(folder / CONFIG, TIMM_PIXELS))


def _pixels_told(values: Mapping[str, Any]) -> Normalisation | None:
    published = {**values, **(values.get("pretrained_cfg") or {})}
    mean, std = published.get("mean"), published.get("std")
    return None if mean is None or std is None else Normalisation(_three(mean), _three(std))


def pixels_of(folder: Path) -> Normalisation | None:
    """What transformers makes of pixels from 0 to 255, in terms of pixels from 0 to 1."""
    path = folder / PREPROCESSOR
    if not path.is_file():
        return None
    values = read_object(path, IMAGES)

    def given(name: str, default: Any) -> Any:
        return default if values.get(name) is None else values[name]

    largest = 255 * given("rescale_factor", 1 / 255) if given("do_rescale", True) else 255.0
    if not given("do_normalize", True):
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    elif values.get("image_mean") is None or values.get("image_std") is None:
        raise UserError(
            f"{path} normalises pixels, but does not say image_mean and image_std: add them."
        )
    else:
        mean, std = _three(values["image_mean"]), _three(values["image_std"])
    return Normalisation(tuple(m / largest for m in mean), tuple(s / largest for s in std))


def _three(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list) else (float(value),) * 3


def images(image: int, pixels: Normalisation) -> dict[str, Any]:
    """A `preprocessor_config.json`: square images of `image` pixels, normalised so."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": image, "width": image},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
    }
