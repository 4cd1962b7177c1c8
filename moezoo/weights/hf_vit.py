"""A vision transformer's trunk as a folder that transformers reads: ViT, or DINOv2 with registers.

The inverse of `weights.vit` for models without experts: what a run here has learned goes back into
the names that it came from. LayerScale was folded into matrices when it was read, so DINOv2's is 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moezoo.backbones.vit import ViTConfig
from moezoo.errors import UserError
from moezoo.weights.files import check_new, written_whole
from moezoo.weights.fold import Normalisation
from moezoo.weights.hf_files import ONE
from moezoo.weights.hf_vit_names import DINO, PLAIN_VIT, to_hf_vit
from moezoo.weights.names import NameTable
from moezoo.weights.tensor_file import Planned, write
from moezoo.weights.vit_config import CONFIG, PREPROCESSOR, images

MASK = "embeddings.mask_token"  # of pre-training, which DINOv2's class asks for


class _Kind(NamedTuple):
    """A family: its `model_type`, its class, its names."""

    name: str
    architecture: str
    table: NameTable


VIT = _Kind("vit", "ViTModel", PLAIN_VIT)
DINOV2 = _Kind("dinov2_with_registers", "Dinov2WithRegistersModel", DINO)


def save(
    folder: Path | str,
    config: ViTConfig,
    trunk: Mapping[str, np.ndarray],
    image: int,
    pixels: Normalisation,
) -> None:
    """Write a trunk by our paths, for square images of `image` pixels, float32.

    trunk: everything but heads, with a last norm; maps are [in, out], patches' [side, side, 3, D].
    pixels: what the model sees of them. A trunk with registers becomes a DINOv2, another one a ViT.
    The folder appears whole under its name, or not at all.
    Raises UserError where it exists, or the family has no such part.
    """
    folder, kind = Path(folder), DINOV2 if config.registers else VIT
    check_new(folder)
    arrays, unknown = to_hf_vit(trunk, kind.table)
    if unknown:
        raise UserError(
            f"{sorted(unknown)[0]} has no name in transformers' {kind.name}: only a dense trunk "
            "with one linear map of patches, learned positions and no norms on queries and keys "
            "can be written."
        )
    arrays |= _own_parts(config) if config.registers else {}
    with written_whole(folder) as temporary:
        planned = {name: _planned(array) for name, array in arrays.items()}
        write(temporary / ONE, planned)
        for name, told in (
            (CONFIG, _config(config, kind, image)),
            (PREPROCESSOR, images(image, pixels)),
        ):
            (temporary / name).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _own_parts(config: ViTConfig) -> dict[str, np.ndarray]:
    """What DINOv2 has besides, such that it changes nothing."""
    scale = np.ones(config.width, np.float32)
    names = (
        f"encoder.layer.{i}.layer_scale{n}.lambda1" for i in range(config.depth) for n in (1, 2)
    )
    return dict.fromkeys(names, scale) | {MASK: np.zeros((1, config.width), np.float32)}


def _planned(array: np.ndarray) -> Planned:
    kept = np.asarray(array, np.float32)
    return Planned(kept.shape, kept.dtype, lambda: kept)


def _config(config: ViTConfig, kind: _Kind, image: int) -> dict[str, Any]:
    told: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": kind.name,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_hidden,
        "image_size": image,
        "patch_size": config.patch,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "torch_dtype": "float32",
    }
    if not config.registers:
        return told
    if config.mlp_hidden % config.width:
        raise UserError(
            f"mlp_ratio is {config.mlp_ratio}; {kind.name} has only whole ones: it cannot be "
            "written."
        )
    told.pop("intermediate_size")
    return told | {
        "mlp_ratio": config.mlp_hidden // config.width,
        "num_register_tokens": config.registers,
    }
