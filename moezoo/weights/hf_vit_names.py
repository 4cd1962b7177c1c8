"""Names of vision transformers in the files of transformers: ViT, DeiT, DINOv2, with registers too.

Queries, keys and values are separate there and one matrix here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moezoo.weights.names import (
    CONV,
    NameTable,
    ParameterName,
    Translated,
    linear,
    norm,
    to_ours,
    to_theirs,
)

PREFIXES = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "swin.")
PATCHES = "embeddings.patch_embeddings.projection.weight"
LAYER = "encoder.layer.{0}"
QKV = ("query", "key", "value")

# What stands before and behind the layers, of an AST, too.
EMBEDDINGS = [
    ParameterName("cls_token", "embeddings.cls_token"),
    ParameterName("dist_token", "embeddings.distillation_token"),
    ParameterName("pos_embed", "embeddings.position_embeddings"),
    *linear("patch_embed", "embeddings.patch_embeddings.projection", CONV),
    *norm("norm", "layernorm"),
]
_ATTENTION = [
    *linear("blocks/{0}/attn/qkv", f"{LAYER}.attention.attention.qkv"),
    *linear("blocks/{0}/attn/proj", f"{LAYER}.attention.output.dense"),
]
PLAIN_VIT: NameTable = [
    *EMBEDDINGS,
    *_ATTENTION,
    *norm("blocks/{0}/norm1", f"{LAYER}.layernorm_before"),
    *norm("blocks/{0}/norm2", f"{LAYER}.layernorm_after"),
    *linear("blocks/{0}/mlp/fc1", f"{LAYER}.intermediate.dense"),
    *linear("blocks/{0}/mlp/fc2", f"{LAYER}.output.dense"),
]
DINO: NameTable = [
    *EMBEDDINGS,
    ParameterName("register_tokens", "embeddings.register_tokens"),
    *_ATTENTION,
    *norm("blocks/{0}/norm1", f"{LAYER}.norm1"),
    *norm("blocks/{0}/norm2", f"{LAYER}.norm2"),
    *linear("blocks/{0}/mlp/fc1", f"{LAYER}.mlp.fc1"),
    *linear("blocks/{0}/mlp/fc2", f"{LAYER}.mlp.fc2"),
    ParameterName("blocks/{0}/ls1", f"{LAYER}.layer_scale1.lambda1"),
    ParameterName("blocks/{0}/ls2", f"{LAYER}.layer_scale2.lambda1"),
]
HF_VIT: NameTable = [*PLAIN_VIT, *DINO]


def bare(name: str) -> str:
    """A name without that of the model, which those with a classifier put in front."""
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    return name.removeprefix(prefix)


def from_hf_vit(arrays: Mapping[str, np.ndarray], table: NameTable = HF_VIT) -> Translated:
    """Arrays of such a file under our paths and in our layouts, queries, keys and values joined.

    Raises ValueError where two arrays have the same name.
    """
    joined: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    names: dict[str, str] = {}
    for name, array in arrays.items():
        module, _, leaf = bare(name).rpartition(".")
        folder, _, which = module.rpartition(".")
        if bare(name) in names:
            raise ValueError(f"there are two arrays for {bare(name)}")
        names[bare(name)] = name
        if which in QKV and array.ndim:
            parts.setdefault(f"{folder}.qkv.{leaf}", {})[which] = array
        else:
            joined[bare(name)] = array
    left: list[str] = []
    split = {
        name: [name.replace(".qkv.", f".{which}.") for which in by] for name, by in parts.items()
    }
    for name, by_part in parts.items():
        shapes = {array.shape[1:] for array in by_part.values()}
        if by_part.keys() == set(QKV) and len(shapes) == 1:
            joined[name] = np.concatenate([by_part[which] for which in QKV], axis=0)
        else:
            left += split[name]
    found = to_ours(joined, table)
    # What was joined and has no place is called as it was before.
    unknown = [one for name in found.unknown for one in split.get(name, [name])]
    return Translated(found.arrays, [names[name] for name in (*unknown, *left)])


def to_hf_vit(flat: Mapping[str, np.ndarray], table: NameTable) -> Translated:
    """Inverse of `from_hf_vit` for the names of one family, such as `PLAIN_VIT` or `DINO`."""
    made: dict[str, np.ndarray] = {}
    arrays, unknown = to_theirs(flat, table)
    for name, array in arrays.items():
        if ".qkv." not in name:
            made[name] = array
            continue
        for which, part in zip(QKV, np.split(array, 3), strict=True):
            made[name.replace(".qkv.", f".{which}.")] = part
    return Translated(made, unknown)
