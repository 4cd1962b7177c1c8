"""What a pretrained transformer has beside ours, folded exactly into the matrices that ours has.

LayerScale (Touvron et al., arXiv:2103.17239) multiplies the outputs of attention and MLP, feature
by feature; both end in a linear map, whose columns take the factors. Other means and deviations of
what it reads are an affine map of every channel in front of the patches' linear map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

# Where the factors lie, and the linear map that they follow.
SCALES = {"ls1": "attn/proj", "ls2": "mlp/fc2"}


class Normalisation(NamedTuple):
    """What a model sees: minus the mean, over the deviation, by channel; of pixels scaled to 0..1
    by colour, of log-mel features alike in all bands."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def is_scale(path: str) -> bool:
    """Whether this is a LayerScale."""
    return path.startswith("blocks/") and path.rpartition("/")[2] in SCALES


def layer_scale(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same function without LayerScale, float32."""
    made = {path: array for path, array in found.items() if not is_scale(path)}
    for path in filter(is_scale, found):
        block, _, name = path.rpartition("/")
        for leaf in ("kernel", "bias"):
            place = f"{block}/{SCALES[name]}/{leaf}"
            if place in made:
                made[place] = np.asarray(made[place], np.float32) * found[path].astype(np.float32)
    return made


def inputs(
    found: Mapping[str, np.ndarray], theirs: Normalisation, ours: Normalisation
) -> dict[str, np.ndarray]:
    """The same function of inputs that are normalised as ours instead of as theirs.

    patch_embed's kernel [side, side, C, D]: x_theirs = x_ours * s / s' + (m - m') / s'.
    """
    if theirs == ours:
        return dict(found)
    kernel = np.asarray(found["patch_embed/kernel"], np.float64)
    bias = np.asarray(found["patch_embed/bias"], np.float64)
    std = np.asarray(theirs.std, np.float64)
    scale_C = np.asarray(ours.std, np.float64) / std
    shift_C = (np.asarray(ours.mean, np.float64) - np.asarray(theirs.mean, np.float64)) / std
    made = {
        "patch_embed/kernel": kernel * scale_C[:, None],
        "patch_embed/bias": bias + np.einsum("pqcd,c->d", kernel, shift_C),
    }
    return {**found, **{path: array.astype(np.float32) for path, array in made.items()}}
