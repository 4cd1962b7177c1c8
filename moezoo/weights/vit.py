"""The trunk of a vision transformer from a file of pretrained weights.

Two kinds: the JAX checkpoints of vision_transformer and big_vision (.npz: "augreg" and others),
and PyTorch ones with the names of timm and DeiT (.safetensors). What is no trunk (the classifier)
stays behind. Positions are resized bicubically (A = -0.75, pixel centres correspond), as where
TaskPrompter and MLoRE begin; M3ViT's code does it bilinearly. Pixels stay normalised by the mean
and deviation of ImageNet, as in those papers' code, although augreg saw pixels from -1 to 1, and
GELU stays exact, as timm reads these files, although they were trained with its approximation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from moezoo.backbones.augreg_names import AUGREG, from_augreg, heads_of
from moezoo.backbones.names import VIT, Table, Translated, known, to_ours
from moezoo.errors import UserError
from moezoo.ops.interpolate import bicubic, resize_position_embedding
from moezoo.weights import files

POSITIONS = "pos_embed"
NO_TRUNK = ("head/",)


class Kind(NamedTuple):
    """One project's names: an array that tells them, their table, their arrays as ours."""

    told_by: tuple[str, ...]
    table: Table
    translate: Callable[[Mapping[str, np.ndarray]], Translated]


KINDS = (
    Kind(("embedding/kernel", "params/embedding/kernel"), AUGREG, from_augreg),
    Kind(("patch_embed.proj.weight",), VIT, lambda arrays: to_ours(arrays, VIT)),
)


class Target(NamedTuple):
    """The model that begins with the weights: shapes of its parameters by path, patches in height
    and width, attention heads."""

    shapes: Mapping[str, tuple[int, ...]]
    grid: tuple[int, int]
    heads: int


def check(path: Path) -> None:
    """UserError where the file is missing, cannot be read or holds no vision transformer."""
    _kind(path, files.names(path))


def trunk(path: Path, target: Target) -> dict[str, np.ndarray]:
    """The trunk's parameters by our paths, in float32 and with positions of the model's grid.

    Positions [1, 1 + h*w, D] have the class token's in front. Raises UserError as `check`, and for
    sizes other than the model's: nothing of the trunk may be left out.
    """
    arrays = files.load(path)
    kind = _kind(path, list(arrays))
    found = {
        ours: np.asarray(array, np.float32)
        for ours, array in kind.translate(arrays).arrays.items()
        if not ours.startswith(NO_TRUNK)
    }
    _check_depth(path, found, target)
    heads = heads_of(arrays)
    if heads not in (None, target.heads):
        raise UserError(
            f"'{path}' has {heads} attention heads, the model {target.heads}: set --model.heads "
            f"{heads}, or take another file."
        )
    if POSITIONS in found:
        found[POSITIONS] = _positions(path, found[POSITIONS], target.grid)
    _check_shapes(path, found, target, kind.table)
    return found


def _kind(path: Path, names: Sequence[str]) -> Kind:
    for kind in KINDS:
        if set(kind.told_by) & set(names):
            return kind
    raise UserError(
        f"'{path}' holds no vision transformer that is known here: an array is called "
        "'embedding/kernel' in augreg's files, 'patch_embed.proj.weight' in those of timm and DeiT."
    )


def _blocks(paths: Any) -> int:
    return len({path.split("/")[1] for path in paths if path.startswith("blocks/")})


def _check_depth(path: Path, found: Mapping[str, Any], target: Target) -> None:
    depth, wanted = _blocks(found), _blocks(target.shapes)
    if depth != wanted:
        raise UserError(
            f"'{path}' has {depth} blocks, the model {wanted}: set --model.depth {depth}, or take "
            "another file."
        )


def _positions(path: Path, positions_1TD: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    tokens = positions_1TD.shape[1] if positions_1TD.ndim == 3 else 0
    special = tokens - int(tokens**0.5) ** 2
    if special not in (0, 1, 2) or not tokens:
        raise UserError(
            f"'{path}' has positions of {tokens} tokens, which are no square grid of patches: "
            "take another file."
        )
    return np.asarray(resize_position_embedding(jnp.asarray(positions_1TD), grid, bicubic))


def _check_shapes(
    path: Path, found: Mapping[str, np.ndarray], target: Target, table: Table
) -> None:
    """Every parameter of the model that the names know must be there with its size."""
    for ours in sorted(known(target.shapes, table)):
        shape = target.shapes[ours]
        if ours.startswith(NO_TRUNK):
            continue
        if ours not in found:
            raise UserError(
                f"'{path}' lacks {ours}, which the model begins with: it is incomplete or of "
                "another kind; take another file."
            )
        size = found[ours].shape
        if size != shape and not (ours == POSITIONS and _patches_of(size) == shape):
            raise UserError(
                f"'{path}' has {ours} of {list(size)}, the model of {list(shape)}: set "
                "model.width, model.patch and model.mlp-ratio to the file's, or take another one."
            )


def _patches_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The positions of a model without a class token, which comes first."""
    return (shape[0], shape[1] - 1, shape[2])
