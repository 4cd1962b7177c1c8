"""A pretrained vision transformer whose arrays are not read yet: its form, names and shapes.

The forms in which they are published (`KINDS`) are told by the names of their arrays.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moezoo.errors import UserError
from moezoo.schema_check import first_line
from moezoo.weights import (
    files,
    hf_files,
    m3vit_names,
    mlore_names,
    mod_squad_names,
    ranks,
    vit_config,
    vmoe_names,
)
from moezoo.weights.augreg_names import AUGREG, PARAMS, from_augreg, heads_of
from moezoo.weights.files import OpenWeights
from moezoo.weights.fold import Normalisation
from moezoo.weights.hf_vit_names import HF_VIT, PATCHES, PREFIXES, bare, from_hf_vit
from moezoo.weights.names import (
    VIT,
    NameTable,
    ParameterName,
    Translated,
    known,
    norm,
    to_ours,
)

COUNTER = "num_batches_tracked"  # of a batch normalisation, which nothing reads
COUNTERS = (COUNTER, *mod_squad_names.COUNTERS)  # of no interest to anybody who begins with them


class NamingScheme(NamedTuple):
    """One project's names: an array that tells them, their table, their arrays as ours.

    `beyond`: names, without what stands in front of all, that are no trunk but what pre-training
    put on top: classifiers, pooling for them, decoders, the token of masked patches, an optimiser.
    Of whole models, which were trained for tasks: `own_grid`, whether positions lie on the grid of
    their images, which may be no square; `parts`, before our paths of what stays behind where the
    model has no such part; `task`, what finds tasks in names.
    """

    title: str
    told_by: tuple[str, ...]
    table: NameTable
    translate: Callable[[Mapping[str, np.ndarray]], Translated]
    beyond: re.Pattern[str]
    plain: Callable[[str], str] = str
    own_grid: bool = False
    parts: tuple[str, ...] = ()
    task: re.Pattern[str] | None = None


# What a trunk of ours has not, and what becomes of it is decided in `vit`.
TIMM: NameTable = [
    *VIT,
    ParameterName("dist_token", "dist_token"),
    ParameterName("register_tokens", "reg_token"),
    *norm("blocks/{0}/attn/query_norm", "blocks.{0}.attn.q_norm"),
    *norm("blocks/{0}/attn/key_norm", "blocks.{0}.attn.k_norm"),
    *(ParameterName(f"blocks/{{0}}/ls{i}", f"blocks.{{0}}.ls{i}.gamma") for i in (1, 2)),
    *(ParameterName(f"blocks/{{0}}/ls{i}", f"blocks.{{0}}.gamma_{i}") for i in (1, 2)),
]

KINDS = (
    NamingScheme(
        "M3ViT",
        tuple(f"{before}blocks.1.mlp.experts.htoh4.weight" for before in ("backbone.", "")),
        m3vit_names.MODEL,
        m3vit_names.from_checkpoint,
        re.compile(rf"backbone\.head\..*|.*\.{COUNTER}"),
        m3vit_names.whole,
        own_grid=True,
        parts=("heads/", "tam/"),
        task=re.compile(r"decoders\.(\w+)\..*"),
    ),
    NamingScheme(
        "MLoRE",
        ("backbone.MLoRE_1.0.share_conv.weight",),
        mlore_names.MLORE,
        mlore_names.from_mlore,
        re.compile(rf"backbone\.head\..*|.*\.{COUNTER}"),
        mlore_names.plain,
        own_grid=True,
        parts=("heads/",),
    ),
    NamingScheme(
        "Mod-Squad",
        tuple(before + name for before in ("", "module.") for name in mod_squad_names.TOLD_BY),
        mod_squad_names.MOD_SQUAD,
        mod_squad_names.from_mod_squad,
        mod_squad_names.BEYOND,
        mod_squad_names.plain,
        own_grid=True,
    ),
    NamingScheme(
        "V-MoE",
        tuple(f"{before}Encoder/posembed_input/pos_embedding" for before in ("", PARAMS)),
        [*vmoe_names.SOFT, *vmoe_names.table("head")],
        vmoe_names.from_checkpoint,
        re.compile(r"(head|pre_logits|opt)/.*"),
        lambda name: name.removeprefix(PARAMS),
    ),
    NamingScheme(
        "augreg",
        ("embedding/kernel", f"{PARAMS}embedding/kernel"),
        AUGREG,
        from_augreg,
        re.compile(r"(head|pre_logits|MAPHead_0|opt)/.*"),
        lambda name: name.removeprefix(PARAMS),
    ),
    NamingScheme(
        "timm",
        ("patch_embed.proj.weight",),
        TIMM,
        lambda arrays: to_ours(arrays, TIMM),
        re.compile(
            r"(head|head_dist|fc_norm|pre_logits|attn_pool|decoder|dino_head|ibot_head)\..*"
            r"|decoder_\w+(\..*)?|mask_token"
        ),
    ),
    NamingScheme(
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


def kind_of(names: Sequence[str]) -> NamingScheme | None:
    """The form of a file with arrays of these names."""
    there = set(names)
    return next((kind for kind in KINDS if there & set(kind.told_by)), None)


def wanted(paths: Sequence[str] | Mapping[str, object], kind: NamingScheme) -> list[str]:
    """Those of our paths that a file of this kind must have, in order."""
    apart = (*NO_TRUNK, *kind.parts)
    return sorted(path for path in known(paths, kind.table) if not path.startswith(apart))


NO_TRUNK = ("head/",)
Shape = tuple[int, ...]


class ViTSource(NamedTuple):
    """Pretrained weights whose arrays are not read yet.

    shapes: of the trunk's parameters by our paths, LayerScale and extra tokens included. beyond:
    names of what is no trunk. unknown: names that no line of the kind's table has. pixels: how it
    wants them, None where it does not tell. tasks: those that it was trained for,
    where names tell them; ordered: whether they stand in its order, not in that of the alphabet,
    into which other programs bring names.
    """

    path: Path
    weights: OpenWeights
    kind: NamingScheme
    shapes: Mapping[str, Shape]
    beyond: tuple[str, ...]
    unknown: tuple[str, ...]
    heads: int | None
    pixels: Normalisation | None
    tasks: tuple[str, ...] = ()
    ordered: bool = True

    @property
    def depth(self) -> int:
        """Blocks."""
        return blocks(self.shapes)


def source(path: Path) -> ViTSource:
    """What a file or a folder holds, from names and shapes alone.

    Raises UserError where it is missing, cannot be read or holds no vision transformer.
    """
    folder = path if path.is_dir() else path.parent
    named = (path.is_dir() and not ranks.is_folder(path)) or path.name in (
        hf_files.ONE,
        hf_files.PICKLED,
    )
    about = vit_config.read_config(folder) if named else vit_config.VitFolder()
    weights = _opened(path)
    kind = kind_of(list(weights.stored))
    if kind is None:
        raise UserError(
            f"'{path}' holds no vision transformer that is known here: an array is called "
            "'embedding/kernel' in augreg's files, 'patch_embed.proj.weight' in those of timm and "
            "DeiT, 'embeddings.patch_embeddings.projection.weight' in those of transformers."
        )
    beyond = tuple(n for n in weights.stored if kind.beyond.fullmatch(kind.plain(n)))
    names = [name for name in weights.stored if name not in set(beyond)]
    shapes, unknown = _shapes(path, weights, kind, names)
    heads = heads_of({n: weights.stored[n].shape for n in names}) or about.heads
    width = shapes.get("patch_embed/bias", (0,))[-1]
    if about.width not in (None, width):
        raise UserError(
            f"'{path}' has width {width}, but the config.json beside it {about.width}: take both "
            "from the same model."
        )
    _check_grid(path, shapes, about.grid)
    tasks, ordered = _tasks(names, kind), names != sorted(names)
    return ViTSource(
        path, weights, kind, shapes, beyond, unknown, heads, about.pixels, tasks, ordered
    )


def _opened(path: Path) -> OpenWeights:
    if ranks.is_folder(path):
        return ranks.Ranks(path)
    return FolderWeights(path) if path.is_dir() else files.open_file(path)


def _tasks(names: Sequence[str], kind: NamingScheme) -> tuple[str, ...]:
    if kind.task is None:
        return ()
    found = (kind.task.fullmatch(kind.plain(name)) for name in names)
    return tuple(dict.fromkeys(match[1] for match in found if match))


def _check_grid(path: Path, shapes: Mapping[str, Shape], grid: tuple[int, int] | None) -> None:
    """UserError where the positions are not those of the images that the configuration tells."""
    positions = shapes.get("pos_embed", ())
    if grid is None or len(positions) != 3:
        return
    if grid[0] != grid[1] or not 0 <= positions[1] - grid[0] * grid[1] <= 2:
        raise UserError(
            f"'{path}' has {positions[1]} positions, but the config.json beside it tells of "
            f"{grid[0]} x {grid[1]} patches (image_size over patch_size): only square images of "
            "that size can be."
        )


class FolderWeights:
    """The arrays of a folder of transformers or timm."""

    note = ""

    def __init__(self, path: Path):
        self.path = path
        self._files = hf_files.tensor_files(path)
        self.stored = {name: files.stored(file, name) for name, file in self._files.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name, np.array)


def _shapes(
    path: Path, weights: OpenWeights, kind: NamingScheme, names: Sequence[str]
) -> tuple[dict[str, Shape], tuple[str, ...]]:
    """Shapes by our paths, and names without one: empty arrays go the way of real ones."""
    stand_ins = {n: np.broadcast_to(np.int8(0), weights.stored[n].shape) for n in names}
    try:
        found = kind.translate(stand_ins)
    except (ValueError, IndexError, MemoryError, OverflowError) as error:
        raise UserError(
            f"'{path}' has arrays of other dimensions than a vision transformer's "
            f"({first_line(error)}): take another file."
        ) from error
    unknown = set(found.unknown)
    for name in names:
        if name not in unknown and kind.plain(name) not in unknown:
            files.float_type(weights.stored[name], name, path)
    shapes = {p: tuple(a.shape) for p, a in found.arrays.items() if not p.startswith(NO_TRUNK)}
    return shapes, tuple(found.unknown)


def blocks(paths: Mapping[str, object]) -> int:
    """Blocks among our paths."""
    return len({path.split("/")[1] for path in paths if path.startswith("blocks/")})
