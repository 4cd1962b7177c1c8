"""Human parts of PASCAL-Context from the annotations of objects and their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data.dense import files
from moezoo.errors import UserError

PERSON = 15  # the number of people among PASCAL's 20 classes

_FACE = ("hair", "head", "mouth", "nose")
_SIDED = {
    1: ("ear", "ebrow", "eye"),
    3: ("uarm",),
    4: ("larm", "hand"),
    5: ("uleg",),
    6: ("lleg", "foot"),
}
# PASCAL-Part's names of a person's parts, and the six classes of the benchmark (0 is background).
CLASS_OF_PART = (
    {name: 1 for name in _FACE}
    | {"neck": 2, "torso": 2}
    | {side + name: n for n, names in _SIDED.items() for name in names for side in "lr"}
)


def objects(path: Path) -> list[Any]:
    """The objects of an annotation file; fields are class, class_ind, mask, parts, in this order.

    Raises UserError when the file has another structure.
    """
    annotation = files.matlab(path, "anno")
    try:
        found = annotation[0, 0][1]
        return [found[0, k] for k in range(found.shape[1])] if found.size else []
    except (IndexError, TypeError, AttributeError) as error:
        raise _malformed(path) from error


def _malformed(path: Path) -> UserError:
    return UserError(f"'{path}' is no annotation of objects and parts: {files.AGAIN}.")


def kinds(path: Path) -> list[int]:
    """The class of every object, -1 for one whose mask is empty.

    These are the numbers that other loaders write to `ImageSets/Parts`; nothing is written here.
    """
    try:
        return [int(np.ravel(o[1])[0]) if np.any(o[2]) else -1 for o in objects(path)]
    except (IndexError, TypeError, ValueError) as error:
        raise _malformed(path) from error


def parts_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Part classes uint8 of the annotation's size, all 0 [size] where nobody's parts are known.

    Parts are painted in their stored order, later ones over earlier ones. Raises UserError for an
    unknown part and for masks of different sizes.
    """
    painted: np.ndarray | None = None
    if PERSON not in kinds(path):
        return np.zeros(size, np.uint8)
    for thing in objects(path):
        if int(np.ravel(thing[1])[0]) != PERSON or not thing[3].size:
            continue
        for part in np.ravel(thing[3]):
            name, mask = _part(path, part)
            if painted is None:
                painted = np.zeros(mask.shape, np.uint8)
            if mask.shape != painted.shape:
                raise _malformed(path)
            painted[mask] = CLASS_OF_PART[name]
    return np.zeros(size, np.uint8) if painted is None else painted


def _part(path: Path, part: Any) -> tuple[str, np.ndarray]:
    try:
        name, mask = str(np.ravel(part[0])[0]), np.asarray(part[1]) > 0
    except (IndexError, TypeError, ValueError) as error:
        raise _malformed(path) from error
    if name not in CLASS_OF_PART:
        raise UserError(f"'{path}' names an unknown part of a person, '{name}': {files.AGAIN}.")
    if mask.ndim != 2:
        raise _malformed(path)
    return name, mask
