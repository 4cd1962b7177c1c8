"""The trunk of a vision transformer from pretrained weights.

Three forms: the JAX checkpoints of vision_transformer and big_vision (.npz: "augreg" and others),
PyTorch ones with the names of timm and DeiT (.safetensors), and those of transformers (ViT, DeiT,
DINOv2). What pre-training put on top of the trunk (a classifier, a decoder) stays behind,
LayerScale is folded into the matrices that it follows, and an array that is neither is refused.

Positions are resized bicubically (A = -0.75, pixel centres correspond), as where TaskPrompter and
MLoRE begin; M3ViT's code does it bilinearly. Where a folder tells how its pixels are normalised,
the patches' map is changed so that it sees the same; a file does not tell: its pixels are
normalised by the mean and deviation of ImageNet, as in those papers' code, although augreg saw
pixels from -1 to 1. GELU stays exact, as timm reads these files, although they were trained with
its approximation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moezoo.errors import UserError
from moezoo.ops.interpolate import bicubic, resize_position_embedding
from moezoo.schema_check import shortened
from moezoo.weights import files, fold
from moezoo.weights.fold import Inputs
from moezoo.weights.vit_fit import POSITIONS, Target, check, named, special
from moezoo.weights.vit_source import NO_TRUNK, Source, source

# Of ImageNet, what models here see where nobody says otherwise.
PIXELS = Inputs((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def trunk(
    path: Path, target: Target, without: Sequence[str] = (), pixels: Inputs = PIXELS
) -> files.Arrays:
    """What `read` gives of a file or folder."""
    return read(source(path), target, without, pixels)


def read(
    given: Source, target: Target, without: Sequence[str] = (), pixels: Inputs = PIXELS
) -> files.Arrays:
    """The trunk's parameters by our paths, in float32 and with positions of the model's grid.

    Positions [1, 1 + h*w, D] have the class token's in front. pixels: what the model will see of
    them. Raises UserError as `misfits` tells, for damage, and for values that are not finite.
    """
    check(given, target, without)
    skipped = {*given.beyond, *given.unknown}
    names = [name for name in given.weights.stored if name not in skipped]
    arrays = {name: _finite(given, name) for name in names}
    found = {
        path: array
        for path, array in given.kind.translate(arrays).arrays.items()
        if not path.startswith(NO_TRUNK) and not named(path, without)
    }
    found = fold.layer_scale(found)
    if given.pixels is not None and "patch_embed/kernel" in found:
        found = fold.inputs(found, given.pixels, pixels)
    if POSITIONS in found:
        found[POSITIONS] = _positions(found[POSITIONS], special(given.shapes), target.grid)
    return found


def _finite(given: Source, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # of float64, which then is not finite
        array = np.asarray(given.weights.read(name), np.float32)
    if not np.isfinite(array).all():
        raise UserError(
            f"{shortened(name, 200)} in '{given.path}' has values that are not finite: it is "
            "damaged; download it again."
        )
    return array


def _positions(positions_1TD: np.ndarray, first: int, grid: tuple[int, int]) -> np.ndarray:
    if first == 0:
        # Only patches have positions: what is added to a class token is nothing.
        positions_1TD = np.pad(positions_1TD, ((0, 0), (1, 0), (0, 0)))
    return np.asarray(resize_position_embedding(jnp.asarray(positions_1TD), grid, bicubic))
