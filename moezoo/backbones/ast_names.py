"""Our paths of an AST_NAMES and the names of transformers' files, in both spellings.

`encoder.layer.0...` is what all published files have; `layers.0...` are the names of the modules
since transformers 5, which a state dictionary may hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from moezoo.backbones.names import CONV, Name, Table, Translated, linear, norm, to_ours

PREFIX = "audio_spectrogram_transformer."
HEAD = "classifier."

_EMBEDDINGS = [
    Name("cls_token", "embeddings.cls_token"),
    Name("dist_token", "embeddings.distillation_token"),
    Name("pos_embed", "embeddings.position_embeddings"),
    *linear("patch_embed", "embeddings.patch_embeddings.projection", CONV),
    *norm("norm", "layernorm"),
]


OURS = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/fc1", "mlp/fc2")


def _layers(theirs: str, products: Sequence[str]) -> list[Name]:
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
AST_NAMES: Table = [*_EMBEDDINGS, *_layers("encoder.layer.{0}", _PUBLISHED)]
MODULE_NAMES: Table = [*_EMBEDDINGS, *_layers("layers.{0}", _MODULES)]


def from_transformers(state: Mapping[str, np.ndarray]) -> Translated:
    """Arrays of an `ASTModel` or an `ASTForAudioClassification` under our paths, without its head.

    patch_embed's kernel is [bands, frames, 1, D], linear ones are [in, out].
    """
    own = {name.removeprefix(PREFIX): array for name, array in state.items()}
    trunk = {name: array for name, array in own.items() if not name.startswith(HEAD)}
    modern = any(name.startswith("layers.") for name in trunk)
    return to_ours(trunk, MODULE_NAMES if modern else AST_NAMES)
