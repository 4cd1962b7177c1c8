"""Names of dense vision transformers in the JAX checkpoints `vision_transformer` and `big_vision`.

Steiner et al., "How to train your ViT?" (arXiv:2106.10270), published the "augreg" ones. Their
paths are joined by "/". Queries, keys and values are separate there, [D, H, D/H] each, and one
matrix here.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moezoo.weights.names import (
    ArrayLayout,
    NameTable,
    ParameterName,
    Translated,
    to_ours,
    to_theirs,
)

BLOCK = "Transformer/encoderblock_{0}"
QKV = ("query", "key", "value")
PARAMS = "params/"
# [H, D/H, D] -> [D, D]; back needs the number of heads: see `by_head`.
JOINED = ArrayLayout(lambda a: a.reshape(-1, a.shape[-1]), lambda a: a)


def both(ours: str, theirs: str) -> list[ParameterName]:
    """Kernel and bias of a linear layer, called the same on both sides."""
    return [ParameterName(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("kernel", "bias")]


def scale_and_bias(ours: str, theirs: str) -> list[ParameterName]:
    """Scale and bias of a norm, called the same on both sides."""
    return [ParameterName(f"{ours}/{leaf}", f"{theirs}/{leaf}") for leaf in ("scale", "bias")]


def _block(norm2: str, attention: str, mlp: str) -> list[ParameterName]:
    """The sub-modules of a block, which the older code numbers all together."""
    return [
        *scale_and_bias("blocks/{0}/norm1", f"{BLOCK}/LayerNorm_0"),
        *scale_and_bias("blocks/{0}/norm2", f"{BLOCK}/{norm2}"),
        *both("blocks/{0}/attn/qkv", f"{BLOCK}/{attention}/qkv"),
        ParameterName("blocks/{0}/attn/proj/kernel", f"{BLOCK}/{attention}/out/kernel", JOINED),
        ParameterName("blocks/{0}/attn/proj/bias", f"{BLOCK}/{attention}/out/bias"),
        *both("blocks/{0}/mlp/fc1", f"{BLOCK}/{mlp}/Dense_0"),
        *both("blocks/{0}/mlp/fc2", f"{BLOCK}/{mlp}/Dense_1"),
    ]


AUGREG: NameTable = [
    *both("patch_embed", "embedding"),
    ParameterName("cls_token", "cls"),
    ParameterName("pos_embed", "Transformer/posembed_input/pos_embedding"),
    *_block("LayerNorm_2", "MultiHeadDotProductAttention_1", "MlpBlock_3"),
    *scale_and_bias("norm", "Transformer/encoder_norm"),
    *both("head", "head"),
    # What big_vision writes today.
    ParameterName("pos_embed", "pos_embedding"),
    *_block("LayerNorm_1", "MultiHeadDotProductAttention_0", "MlpBlock_0"),
]


def heads_of(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Attention heads, which only the separate kernels of this form tell."""
    kernels = (shape for name, shape in shapes.items() if name.endswith("/query/kernel"))
    return next((shape[1] for shape in kernels if len(shape) == 3), None)


def from_augreg(arrays: Mapping[str, np.ndarray]) -> Translated:
    """Arrays of such a checkpoint under our paths and in our layouts.

    Raises ValueError where the parts of one matrix do not fit each other.
    """
    joined: dict[str, np.ndarray] = {}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        folder, _, leaf = name.removeprefix(PARAMS).rpartition("/")
        module, _, which = folder.rpartition("/")
        if which in QKV:
            parts.setdefault(f"{module}/qkv/{leaf}", {}).setdefault(which, array)
        elif name.removeprefix(PARAMS) in joined:
            raise ValueError(f"there are two arrays for {name.removeprefix(PARAMS)}")
        else:
            joined[name.removeprefix(PARAMS)] = array
    left: list[str] = []
    for name, by_part in parts.items():
        if by_part.keys() == set(QKV):
            # Kernels [D, H, D/H] and biases [H, D/H] lose their last axis but keep its order.
            kernels = [by_part[which].reshape(*by_part[which].shape[:-2], -1) for which in QKV]
            joined[name] = np.concatenate(kernels, axis=-1)
        else:
            left += [name.replace("/qkv/", f"/{which}/") for which in by_part]
    found = to_ours(joined, AUGREG)
    return Translated(found.arrays, [*found.unknown, *left])


def to_augreg(flat: Mapping[str, np.ndarray], heads: int) -> Translated:
    """Inverse of `from_augreg`, in the names of the published files."""
    arrays, unknown = to_theirs(flat, AUGREG)
    return Translated(by_head(arrays, heads), unknown)


def by_head(arrays: Mapping[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """Attention as these projects store it: q, k and v apart, every array with an axis of heads."""
    split = {}
    for name, array in arrays.items():
        if "/qkv/" in name:
            parts = np.split(array, 3, axis=-1)
            split |= {
                name.replace("/qkv/", f"/{which}/"): p.reshape(*p.shape[:-1], heads, -1)
                for which, p in zip(QKV, parts, strict=True)
            }
        elif name.endswith("/out/kernel"):
            split[name] = array.reshape(heads, -1, array.shape[-1])
        else:
            split[name] = array
    return split
