"""Pretrained vision transformers in other projects' names, and what they compute, in NumPy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from scipy.special import erf

WIDTH, DEPTH, HEADS, PATCH, HIDDEN, GRID = 12, 3, 3, 4, 24, 4

Arrays = dict[str, np.ndarray]


def timm(
    seed: int = 0, scale: str = "", tokens: int = 1, registers: int = 0, normed: int = 0
) -> Arrays:
    """Random weights in timm's names; `scale`: LayerScale, "ls{0}.gamma" or "gamma_{0}"; `tokens`:
    positions beside the patches'; `normed`: width of the norms on queries and keys."""
    d, h, p = WIDTH, HIDDEN, PATCH
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "pos_embed": (1, tokens + GRID**2, d),
        "patch_embed.proj.weight": (d, 3, p, p), "patch_embed.proj.bias": (d,),
        "norm.weight": (d,), "norm.bias": (d,), "head.weight": (7, d), "head.bias": (7,),
    }  # fmt: skip
    shapes |= {"reg_token": (1, registers, d)} if registers else {}
    for i in range(DEPTH):
        for part in ("q_norm", "k_norm") if normed else ():
            shapes |= {f"blocks.{i}.attn.{part}.{n}": (normed,) for n in ("weight", "bias")}
        for name, shape in {
            "norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
            "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,), "attn.proj.weight": (d, d),
            "attn.proj.bias": (d,), "mlp.fc1.weight": (h, d), "mlp.fc1.bias": (h,),
            "mlp.fc2.weight": (d, h), "mlp.fc2.bias": (d,),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}"] = shape
        if scale:
            shapes |= {f"blocks.{i}.{scale.format(k)}": (d,) for k in (1, 2)}
    rng = np.random.default_rng(seed)
    return {n: rng.normal(0, 0.4, shape).astype(np.float32) for n, shape in shapes.items()}


def transformers(w: Arrays, names: dict[str, str], prefix: str = "") -> Arrays:
    """timm's arrays in the names of transformers: `names` are those of ViT or of DINOv2."""
    made: Arrays = {}
    for name, array in w.items():
        if name.startswith("head"):
            made[name.replace("head", "classifier")] = array
            continue
        for old, new in {
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
            "dist_token": "embeddings.distillation_token", "blocks.": "encoder.layer.",
            "attn.proj": "attention.output.dense", **names,
        }.items():  # fmt: skip
            name = name.replace(old, new)
        name = "layernorm" + name[4:] if name.startswith("norm.") else name
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                made[prefix + name.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            made[prefix + name] = array
    return made


VIT_NAMES = {
    ".norm1": ".layernorm_before", ".norm2": ".layernorm_after", "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}  # fmt: skip
DINO_NAMES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}


def write(path: Path, arrays: Arrays) -> Path:
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
    return path


def folder(path: Path, arrays: Arrays, config: dict[str, Any], images: Any = None) -> Path:
    """A folder with a `config.json` and maybe a `preprocessor_config.json`."""
    path.mkdir()
    write(path / "model.safetensors", arrays)
    (path / "config.json").write_text(json.dumps(config))
    if images is not None:
        (path / "preprocessor_config.json").write_text(json.dumps(images))
    return path


def features(w: Arrays, x_BHWC: np.ndarray) -> np.ndarray:
    """Tokens behind the last norm as timm computes them from such arrays, float64."""
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) / np.sqrt(var + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def scaled(x: np.ndarray, block: str, number: int) -> np.ndarray:
        names = (f"{block}.ls{number}.gamma", f"{block}.gamma_{number}")
        return x * next((w[name] for name in names if name in w), 1.0)

    p, (b, height, width, _) = PATCH, x_BHWC.shape
    squares = [
        np.einsum("bijc,dcij->bd", x_BHWC[:, y : y + p, x : x + p], w["patch_embed.proj.weight"])
        for y in range(0, height, p)
        for x in range(0, width, p)
    ]
    x = np.stack(squares, 1) + w["patch_embed.proj.bias"]
    first = [np.repeat(w[n], b, 0) for n in ("cls_token", "dist_token", "reg_token") if n in w]
    if w["pos_embed"].shape[1] == x.shape[1]:  # only the patches have positions
        x = np.concatenate([*first, x + w["pos_embed"]], 1)
    else:
        x = np.concatenate([*first, x], 1) + w["pos_embed"]
    registers = w["reg_token"].shape[1] if "reg_token" in w else 0
    for i in range(DEPTH):
        block = f"blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(b, x.shape[1], 3, HEADS, -1).transpose(2, 0, 3, 1, 4)
        if f"{block}.attn.q_norm.weight" in w:
            q, k = norm(q, f"{block}.attn.q_norm"), norm(k, f"{block}.attn.k_norm")
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights / weights.sum(-1, keepdims=True)) @ v
        mixed = mixed.transpose(0, 2, 1, 3).reshape(x.shape)
        x = x + scaled(linear(mixed, f"{block}.attn.proj"), block, 1)
        y = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        y = 0.5 * y * (1 + erf(y / math.sqrt(2)))
        x = x + scaled(linear(y, f"{block}.mlp.fc2"), block, 2)
    x = norm(x, "norm")
    return np.concatenate([x[:, :1], x[:, 1 + registers :]], 1)
