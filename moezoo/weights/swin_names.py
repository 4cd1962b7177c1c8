"""Names of Swin transformers in the files of timm, of Microsoft's code and of transformers.

Patch merging stands in front of a stage here and in timm, which numbers it so; in Microsoft's files
and in those of transformers it stands behind the stage before, under that one's number.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from moezoo.weights.hf_vit_names import bare, from_hf_vit, to_hf_vit
from moezoo.weights.names import (
    CONV,
    LINEAR,
    NameTable,
    ParameterName,
    Translated,
    linear,
    norm,
    to_ours,
    to_theirs,
)

BLOCK, MERGE = "stages/{0}/blocks/{1}", "stages/{0}/merge"
_TIMM_BLOCK, _HF_BLOCK = "layers.{0}.blocks.{1}", "encoder.layers.{0}.blocks.{1}"
TIMM_SWIN: NameTable = [
    *linear("patch_embed", "patch_embed.proj", CONV),
    *norm("patch_norm", "patch_embed.norm"),
    *norm(f"{BLOCK}/norm1", f"{_TIMM_BLOCK}.norm1"),
    *norm(f"{BLOCK}/norm2", f"{_TIMM_BLOCK}.norm2"),
    *linear(f"{BLOCK}/attn/qkv", f"{_TIMM_BLOCK}.attn.qkv"),
    *linear(f"{BLOCK}/attn/proj", f"{_TIMM_BLOCK}.attn.proj"),
    ParameterName(f"{BLOCK}/attn/offset_bias", f"{_TIMM_BLOCK}.attn.relative_position_bias_table"),
    *linear(f"{BLOCK}/mlp/fc1", f"{_TIMM_BLOCK}.mlp.fc1"),
    *linear(f"{BLOCK}/mlp/fc2", f"{_TIMM_BLOCK}.mlp.fc2"),
    *norm(f"{MERGE}/norm", "layers.{0}.downsample.norm"),
    ParameterName(f"{MERGE}/reduction/kernel", "layers.{0}.downsample.reduction.weight", LINEAR),
    *norm("norm", "norm"),
]
_HF_TABLE = f"{_HF_BLOCK}.attention.self.relative_position_bias_table"
HF_SWIN: NameTable = [
    *linear("patch_embed", "embeddings.patch_embeddings.projection", CONV),
    *norm("patch_norm", "embeddings.norm"),
    *norm(f"{BLOCK}/norm1", f"{_HF_BLOCK}.layernorm_before"),
    *norm(f"{BLOCK}/norm2", f"{_HF_BLOCK}.layernorm_after"),
    *linear(f"{BLOCK}/attn/qkv", f"{_HF_BLOCK}.attention.self.qkv"),
    *linear(f"{BLOCK}/attn/proj", f"{_HF_BLOCK}.attention.output.dense"),
    ParameterName(f"{BLOCK}/attn/offset_bias", _HF_TABLE),
    *linear(f"{BLOCK}/mlp/fc1", f"{_HF_BLOCK}.intermediate.dense"),
    *linear(f"{BLOCK}/mlp/fc2", f"{_HF_BLOCK}.output.dense"),
    *norm(f"{MERGE}/norm", "encoder.layers.{0}.downsample.norm"),
    ParameterName(
        f"{MERGE}/reduction/kernel", "encoder.layers.{0}.downsample.reduction.weight", LINEAR
    ),
    *norm("norm", "layernorm"),
]
# What tells the two kinds: the patches' map.
TIMM_TOLD, HF_TOLD = "patch_embed.proj.weight", "embeddings.patch_embeddings.projection.weight"
# Constants that old files hold; nothing learned.
CONSTANTS = re.compile(r".*\.(relative_position_index|attn_mask)")
# What pre-training put on top.
BEYOND = re.compile(r"(classifier|head|decoder|pooler)\..*|embeddings\.mask_token|mask_token")
_DOWN = re.compile(r"((?:encoder\.)?layers\.)(\d+)(\.downsample\..*)")


def _moved(name: str, by: int) -> str:
    """The name of a merging layer under the number of another stage; others as they are."""
    match = _DOWN.fullmatch(name)
    return f"{match[1]}{int(match[2]) + by}{match[3]}" if match else name


def is_hf(names: Mapping[str, object]) -> bool:
    """Whether these are transformers' names."""
    return any(bare(name) == HF_TOLD for name in names)


def from_swin(arrays: Mapping[str, np.ndarray]) -> Translated:
    """Arrays of either kind of file under our paths and in our layouts.

    Raises ValueError where two arrays have the same name.
    """
    behind = any(match and match[2] == "0" for match in map(_DOWN.fullmatch, map(bare, arrays)))
    names = {_moved(bare(name), 1 if behind else 0): name for name in arrays}
    if len(names) < len(arrays):
        raise ValueError("two of its arrays have the same name")
    plain = {name: arrays[theirs] for name, theirs in names.items()}
    found = from_hf_vit(plain, HF_SWIN) if is_hf(plain) else to_ours(plain, TIMM_SWIN)
    return Translated(found.arrays, [names[name] for name in found.unknown])


def to_hf_swin(flat: Mapping[str, np.ndarray]) -> Translated:
    """Our arrays in the names of transformers."""
    arrays, unknown = to_hf_vit(flat, HF_SWIN)
    return Translated({_moved(name, -1): array for name, array in arrays.items()}, unknown)


def to_timm_swin(flat: Mapping[str, np.ndarray]) -> Translated:
    """Our arrays in the names of timm."""
    return to_theirs(flat, TIMM_SWIN)
