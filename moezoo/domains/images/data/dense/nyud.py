"""NYUD-v2 as unpacked from `NYUDv2.tar.gz`: semseg (40 classes), depth, normals, edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moezoo.data.source import Labels, SourceExample
from moezoo.domains.images.data.dense import files
from moezoo.domains.images.data.dense.layout import ArchiveLayout, FileKind
from moezoo.domains.images.data.dense.names import NYUD, NYUD_PALETTE
from moezoo.errors import UserError
from moezoo.label import BINARY, CLASSES, DIRECTION, DISTANCE

KINDS = {
    "image": FileKind(("images",), ".png"),
    "semseg": FileKind(("segmentation",), ".png"),
    "depth": FileKind(("depth",), ".npy"),
    "normals": FileKind(("normals",), ".png"),
    "edge": FileKind(("edge",), ".png"),
}


def read(root: Path, name: str) -> SourceExample:
    """One example as `data.source.Source` describes them.

    Stored class 0 is unlabelled and the 40 classes follow it; depth 0 is unknown. Normals are known
    everywhere (8 bits cannot hold the zero vector) and have length 1 up to rounding. Raises
    UserError for unusable files.
    """
    path = {what: kind.path(root, name) for what, kind in KINDS.items()}
    example = {
        "image": files.rgb(path["image"]),
        "semseg": semseg(path["semseg"]),
        "depth": files.metres(path["depth"]),
        "normals": files.directions(files.vectors(path["normals"])),
        "edge": edge(path["edge"]),
    }
    height, width = example["image"].shape[:2]
    for what, values in example.items():
        if values.shape[:2] != (height, width):
            raise UserError(
                f"'{path[what]}' is {values.shape[0]} x {values.shape[1]}, but its image is "
                f"{height} x {width}: {files.AGAIN}."
            )
    return example


def semseg(path: Path) -> np.ndarray:
    """Classes 0..39, 255 unlabelled, from the stored 1..40 and 0."""
    stored = files.single(path)
    classes = len(NYUD)
    files.check_values(path, stored, range(classes + 1), f"NYUD-v2 has classes 0 to {classes}")
    return stored - np.uint8(1)  # 0 becomes 255


def edge(path: Path) -> np.ndarray:
    """0/1 from the stored 0/255."""
    stored = files.single(path)
    files.check_values(path, stored, (0, 255), "edges are 0 or 255")
    return stored // np.uint8(255)


LAYOUT = ArchiveLayout(
    name="nyud",
    title="NYUD-v2",
    folder="NYUDv2",
    lists={"train": "gt_sets/train.txt", "test": "gt_sets/val.txt"},
    counts={"train": 795, "test": 654},
    kinds=KINDS,
    maps={"semseg": CLASSES, "normals": DIRECTION, "edge": BINARY, "depth": DISTANCE},
    labels={"semseg": Labels(NYUD, NYUD_PALETTE)},
    read=read,
    size=(425, 560),
)
