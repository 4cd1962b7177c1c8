"""PASCAL-Context as unpacked from `PASCALContext.tar.gz`: semseg, parts, saliency, normals, edges.

Saliency and normals are predictions of other networks ("distilled"), as in every paper on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moezoo.data.dense import files, people
from moezoo.data.dense.layout import Kind, Layout
from moezoo.data.dense.names import HUMAN_PART_PALETTE, HUMAN_PARTS, VOC, VOC_PALETTE
from moezoo.data.dense.regions import HAS_NORMALS, LARGEST
from moezoo.data.resample import nearest
from moezoo.data.rooms.thin import thin
from moezoo.data.source import REGIONS, Example, Labels
from moezoo.errors import UserError
from moezoo.label import BINARY, CLASSES, DIRECTION
from moezoo.ops.interpolate import bicubic, matrix

KINDS = {
    "image": Kind(("JPEGImages",), ".jpg"),
    "semseg": Kind(("semseg/VOC12", "semseg/pascal-context"), ".png"),
    "regions": Kind(("pascal-context/trainval",), ".mat"),
    "parts": Kind(("human_parts",), ".mat"),
    "normals": Kind(("normals_distill",), ".png"),
    "saliency": Kind(("sal_distill",), ".png"),
}


def read(root: Path, name: str) -> Example:
    """One example as `data.source.Source` describes them, and its `regions` uint16 [H,W].

    Labels of another size than the image are resampled at their nearest pixels, normals by cubic
    convolution. Raises UserError for unusable files.
    """
    path = {what: kind.path(root, name) for what, kind in KINDS.items()}
    image = files.rgb(path["image"])
    size = image.shape[:2]
    regions = region_map(path["regions"])
    normals = files.directions(files.vectors(path["normals"]))
    maps = {
        "semseg": semseg(path["semseg"]),
        "parts": people.parts_map(path["parts"], size),
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
        raise UserError(f"'{path}' holds no map of regions: {files.AGAIN}.")
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


LAYOUT = Layout(
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
