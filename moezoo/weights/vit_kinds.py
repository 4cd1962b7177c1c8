"""The forms in which pretrained vision transformers are published, told by their arrays' names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moezoo.backbones.augreg_names import AUGREG, PARAMS, from_augreg
from moezoo.backbones.hf_vit_names import HF_VIT, PATCHES, PREFIXES, bare, from_hf_vit
from moezoo.backbones.names import VIT, Name, Table, Translated, known, to_ours


class Kind(NamedTuple):
    """One project's names: an array that tells them, their table, their arrays as ours.

    `beyond`: names, without what stands in front of all, that are no trunk but what pre-training
    put on top: classifiers, pooling for them, decoders, the token of masked patches, an optimiser.
    """

    title: str
    told_by: tuple[str, ...]
    table: Table
    translate: Callable[[Mapping[str, np.ndarray]], Translated]
    beyond: re.Pattern[str]
    plain: Callable[[str], str] = str


# What a trunk of ours has not, and what becomes of it is decided in `vit`.
TIMM: Table = [
    *VIT,
    Name("dist_token", "dist_token"),
    *(Name(f"blocks/{{0}}/ls{i}", f"blocks.{{0}}.ls{i}.gamma") for i in (1, 2)),
    *(Name(f"blocks/{{0}}/ls{i}", f"blocks.{{0}}.gamma_{i}") for i in (1, 2)),
]

KINDS = (
    Kind(
        "augreg",
        ("embedding/kernel", f"{PARAMS}embedding/kernel"),
        AUGREG,
        from_augreg,
        re.compile(r"(head|pre_logits|MAPHead_0|opt)/.*"),
        lambda name: name.removeprefix(PARAMS),
    ),
    Kind(
        "timm",
        ("patch_embed.proj.weight",),
        TIMM,
        lambda arrays: to_ours(arrays, TIMM),
        re.compile(
            r"(head|head_dist|fc_norm|pre_logits|attn_pool|decoder|dino_head|ibot_head)\..*"
            r"|decoder_\w+(\..*)?|mask_token"
        ),
    ),
    Kind(
        "transformers",
        tuple(prefix + PATCHES for prefix in ("", *PREFIXES)),
        HF_VIT,
        from_hf_vit,
        re.compile(
            r"(classifier|cls_classifier|distillation_classifier|pooler|decoder)\..*"
            r"|embeddings\.mask_token"
        ),
        bare,
    ),
)


def kind_of(names: Sequence[str]) -> Kind | None:
    """The form of a file with arrays of these names."""
    there = set(names)
    return next((kind for kind in KINDS if there & set(kind.told_by)), None)


def wanted(paths: Sequence[str] | Mapping[str, object], kind: Kind) -> list[str]:
    """Those of our paths that a file of this kind must have, in order."""
    return sorted(path for path in known(paths, kind.table) if not path.startswith("head/"))
