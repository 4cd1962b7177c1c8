"""Names of the published V-MoE code's parameters (and of dense ViTs of the same code).

Its paths are joined by "/". Queries, keys and values are separate there, [D, H, D/H] each, and one
matrix here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moezoo.weights.augreg_names import JOINED, PARAMS, QKV, both, by_head, scale_and_bias
from moezoo.weights.names import NameTable, ParameterName, Translated, to_ours, to_theirs

BLOCK = "Encoder/encoderblock_{0}"


def _mlp(ours: str, theirs: str) -> list[ParameterName]:
    return [*both(f"{ours}/fc1", f"{theirs}/Dense_0"), *both(f"{ours}/fc2", f"{theirs}/Dense_1")]


def table(task: str) -> NameTable:
    """Names on both sides; the classifier of theirs is that of `task` here."""
    return [
        *both("patch_embed", "embedding"),
        ParameterName("cls_token", "cls"),
        ParameterName("pos_embed", "Encoder/posembed_input/pos_embedding"),
        *scale_and_bias("blocks/{0}/norm1", f"{BLOCK}/LayerNorm_0"),
        *scale_and_bias("blocks/{0}/norm2", f"{BLOCK}/LayerNorm_1"),
        *both("blocks/{0}/attn/qkv", f"{BLOCK}/SelfAttention/qkv"),
        ParameterName("blocks/{0}/attn/proj/kernel", f"{BLOCK}/SelfAttention/out/kernel", JOINED),
        ParameterName("blocks/{0}/attn/proj/bias", f"{BLOCK}/SelfAttention/out/bias"),
        ParameterName("blocks/{0}/attn/query_norm/scale", f"{BLOCK}/SelfAttention/query_ln/scale"),
        ParameterName("blocks/{0}/attn/key_norm/scale", f"{BLOCK}/SelfAttention/key_ln/scale"),
        *_mlp("blocks/{0}/mlp/experts", f"{BLOCK}/Moe/Mlp"),
        *_mlp("blocks/{0}/mlp", f"{BLOCK}/Mlp"),
        ParameterName("blocks/{0}/mlp/router/kernel", f"{BLOCK}/Moe/Router/dense/kernel"),
        *scale_and_bias("norm", "Encoder/encoder_norm"),
        *both("pre_logits", "pre_logits"),
        *both(f"heads/{task}", "head"),
    ]


SOFT: NameTable = [
    ParameterName("blocks/{0}/mlp/router/kernel", f"{BLOCK}/Moe/Router/mu"),
    ParameterName("blocks/{0}/mlp/router/scale", f"{BLOCK}/Moe/Router/scale"),
]


def from_reference(arrays: Mapping[str, np.ndarray], task: str) -> Translated:
    """Flat parameters of the published code as ours, the classifier's as that of `task`."""
    joined, parts = {}, {}
    for name, array in arrays.items():
        folder, _, leaf = name.rpartition("/")
        module, _, which = folder.rpartition("/")
        if module.endswith("SelfAttention") and which in QKV:
            parts.setdefault(f"{module}/qkv/{leaf}", {})[which] = array
        else:
            joined[name] = array
    for name, by_part in parts.items():
        # Kernels [D, H, D/H] and biases [H, D/H] lose their last axis but keep its order.
        kernels = [by_part[which].reshape(*by_part[which].shape[:-2], -1) for which in QKV]
        joined[name] = np.concatenate(kernels, axis=-1)
    return to_ours(joined, [*SOFT, *table(task)])


def from_checkpoint(arrays: Mapping[str, np.ndarray]) -> Translated:
    """Those of a checkpoint, whose names may begin with "params/"."""
    return from_reference({n.removeprefix(PARAMS): a for n, a in arrays.items()}, "head")


def to_reference(flat: Mapping[str, np.ndarray], task: str, heads: int) -> Translated:
    """Inverse of `from_reference`; `heads` of the attention."""
    soft = any(name.endswith("mlp/router/scale") for name in flat)
    arrays, unknown = to_theirs(flat, [*(SOFT if soft else []), *table(task)])
    return Translated(by_head(arrays, heads), unknown)
