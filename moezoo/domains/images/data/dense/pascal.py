"""PASCAL-Context as unpacked from `PASCALContext.tar.gz`: semseg, parts, saliency, normals, edges.

Parts are parts of people, from the annotations of objects and their parts. Saliency and normals are
predictions of other networks ("distilled"), as in every paper on it. Normals are learned on regions
whose name also occurs among the classes of NYUD-v2 (on which the network that made them was
trained), without "unknown", and on `tvmonitor` (427): the list that the loader of ASTMT, InvPT and
TaskPrompter derives from the two lists of names, out of 459 kinds of region. Everywhere else
normals are unknown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data.source import REGIONS, Labels, SourceExample
from moezoo.domains.images.data.dense import files
from moezoo.domains.images.data.dense.layout import ArchiveLayout, FileKind
from moezoo.domains.images.data.dense.names import HUMAN_PART_PALETTE, HUMAN_PARTS, VOC, VOC_PALETTE
from moezoo.domains.images.data.resample import nearest
from moezoo.domains.images.thinning import thin
from moezoo.errors import UserError
from moezoo.label import BINARY, CLASSES, DIRECTION
from moezoo.ops.interpolate import bicubic, matrix

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

    Raises UserError if the file has another structure.
    """
    annotation = files.matlab(path, "anno")
    try:
        found = annotation[0, 0][1]
        return [found[0, k] for k in range(found.shape[1])] if found.size else []
    except (IndexError, TypeError, AttributeError) as error:
        raise _malformed(path) from error


def _malformed(path: Path) -> UserError:
    return UserError(f"'{path}' is not an annotation of objects and parts: {files.AGAIN}.")


def kinds(path: Path) -> list[int]:
    """The class of every object, -1 for one with an empty mask.

    These are the numbers that other loaders write to `ImageSets/Parts`; nothing is written here.
    """
    try:
        return [int(np.ravel(o[1])[0]) if np.any(o[2]) else -1 for o in objects(path)]
    except (IndexError, TypeError, ValueError) as error:
        raise _malformed(path) from error


def parts_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Part classes uint8 of the annotation's size, all 0 [size] if nobody's parts are known.

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


LARGEST = 459  # the last kind of region

# fmt: off
WITH_NORMALS = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50,
    51, 53, 55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104,
    105, 107, 111, 113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172,
    174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230,
    232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281,
    283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323,
    329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383,
    384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 429, 430, 432, 440,
    441, 442, 443, 444, 446, 454, 457, 427,
)
# fmt: on


def _table() -> np.ndarray:
    table = np.zeros(LARGEST + 1, bool)
    table[list(WITH_NORMALS)] = True
    return table


HAS_NORMALS = _table()  # bool [460], indexed by a region map


KINDS = {
    "image": FileKind(("JPEGImages",), ".jpg"),
    "semseg": FileKind(("semseg/VOC12", "semseg/pascal-context"), ".png"),
    "regions": FileKind(("pascal-context/trainval",), ".mat"),
    "parts": FileKind(("human_parts",), ".mat"),
    "normals": FileKind(("normals_distill",), ".png"),
    "saliency": FileKind(("sal_distill",), ".png"),
}


def read(root: Path, name: str) -> SourceExample:
    """One example as `data.source.Source` describes them, and its `regions` uint16 [H,W].

    Labels whose size differs from the image's are resampled at their nearest pixels, normals by
    cubic convolution. Raises UserError for unusable files.
    """
    path = {what: kind.path(root, name) for what, kind in KINDS.items()}
    image = files.rgb(path["image"])
    size = image.shape[:2]
    regions = region_map(path["regions"])
    normals = files.directions(files.vectors(path["normals"]))
    maps = {
        "semseg": semseg(path["semseg"]),
        "parts": parts_map(path["parts"], size),
        "saliency": (files.single(path["saliency"]) > 127).astype(np.uint8),
        "edge": outlines(regions),
        "regions": regions,
    }
    fitted = {k: v if v.shape == size else nearest(v, size) for k, v in maps.items()}
    normals = normals if normals.shape[:2] == size else smooth(normals, size)
    known = HAS_NORMALS[fitted["regions"]]
    return {"image": image, "normals": np.where(known[..., None], normals, np.float32(0))} | fitted


def semseg(path: Path) -> np.ndarray:
    """Classes 0..20, 255 unlabelled."""
    stored = files.single(path)
    files.check_values(path, stored, (*range(len(VOC)), 255), "classes are 0 to 20, or 255")
    return stored


def region_map(path: Path) -> np.ndarray:
    """The kind of region of each pixel, uint16 [H,W]."""
    stored = np.asarray(files.matlab(path, "LabelMap"))
    if stored.ndim != 2 or stored.dtype.kind not in "ui":
        raise UserError(f"'{path}' contains no map of regions: {files.AGAIN}.")
    stored = stored.astype(np.uint16)
    files.check_values(path, stored, range(LARGEST + 1), f"kinds of region are 0 to {LARGEST}")
    return stored


def outlines(regions: np.ndarray) -> np.ndarray:
    """Where the Laplacian of a region map is not 0, thinned to one pixel; uint8 0/1.

    Beyond the border the map is mirrored without repeating its last pixel.
    """
    p = np.pad(regions.astype(np.int32), 1, mode="reflect")
    around = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]
    return thin(around != 4 * p[1:-1, 1:-1]).astype(np.uint8)


def smooth(values_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cubic convolution (A = -0.75) at another size, float32."""
    rows, columns = (matrix(n, m, bicubic) for n, m in zip(values_HWC.shape[:2], size, strict=True))
    return np.einsum("th,hwc,uw->tuc", rows, values_HWC, columns, optimize=True)


LAYOUT = ArchiveLayout(
    name="pascal",
    title="PASCAL-Context",
    folder="PASCALContext",
    lists={"train": "ImageSets/Context/train.txt", "test": "ImageSets/Context/val.txt"},
    counts={"train": 4998, "test": 5105},
    kinds=KINDS,
    maps={
        "semseg": CLASSES,
        "parts": CLASSES,
        "saliency": BINARY,
        "normals": DIRECTION,
        "edge": BINARY,
        "regions": REGIONS,
    },
    labels={
        "semseg": Labels(VOC, VOC_PALETTE),
        "parts": Labels(HUMAN_PARTS, HUMAN_PART_PALETTE),
    },
    read=read,
    foreground_only=("parts",),
    extras=("regions",),
)
