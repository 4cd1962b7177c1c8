"""Small archives in the layouts of NYUD-v2 and PASCAL-Context, made from random shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

Size = tuple[int, int]


def blocks(rng: np.random.Generator, size: Size, values: Any, cell: int = 5) -> np.ndarray:
    """A map of squares, each of one of the values."""
    small = rng.choice(values, (size[0] // cell + 1, size[1] // cell + 1))
    return np.kron(small, np.ones((cell, cell), small.dtype))[: size[0], : size[1]]


def picture(rng: np.random.Generator, size: Size, cell: int = 5) -> np.ndarray:
    """A colour picture of squares."""
    return np.stack([blocks(rng, size, np.arange(256, dtype=np.uint8), cell) for _ in "rgb"], -1)


def save(path: Path, values: np.ndarray) -> None:
    """Write a picture; the suffix decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_list(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def make_nyud(folder: Path, train: int = 2, test: int = 1, size: Size = (425, 560)) -> Path:
    """An archive `NYUDv2` in the folder; ids are scattered over both splits."""
    root, rng = folder / "NYUDv2", np.random.default_rng(0)
    names = [f"{7 * k + 1:04}" for k in range(train + test)]
    write_list(root / "gt_sets/train.txt", names[:train])
    write_list(root / "gt_sets/val.txt", names[train:])
    (root / "depth").mkdir()
    cell = max(5, size[0] // 10)
    for name in names:
        save(root / f"images/{name}.png", picture(rng, size, cell))
        save(root / f"normals/{name}.png", picture(rng, size, cell))
        classes = blocks(rng, size, np.arange(41, dtype=np.uint8), cell)
        classes[0, :2] = 0, 40
        save(root / f"segmentation/{name}.png", classes)
        save(root / f"edge/{name}.png", blocks(rng, size, np.array([0, 255], np.uint8), cell))
        depth = blocks(rng, size, np.linspace(0, 9, 10).astype(np.float32), cell)
        np.save(root / f"depth/{name}.npy", depth)
    return root


def person(masks: dict[str, np.ndarray], kind: int = 15) -> tuple:
    """One object of an annotation: class, number, mask, parts."""
    parts = np.zeros((1, len(masks)), [("part_name", object), ("mask", object)])
    for k, (name, mask) in enumerate(masks.items()):
        parts[0, k] = (name, mask.astype(np.uint8))
    whole = np.any(list(masks.values()), axis=0) if masks else np.ones((2, 2))
    return ("thing", float(kind), whole.astype(np.uint8), parts if masks else np.zeros((0, 0)))


def save_people(path: Path, objects: list[tuple]) -> None:
    """An annotation of objects and their parts as a MATLAB file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = [(f, object) for f in ("class", "class_ind", "mask", "parts")]
    found = np.zeros((1, len(objects)), fields)
    for k, thing in enumerate(objects):
        found[0, k] = thing
    annotation = np.zeros((1, 1), [("imname", object), ("objects", object)])
    annotation[0, 0] = (path.stem, found)
    scipy.io.savemat(path, {"anno": annotation})


def make_pascal(folder: Path, train: int = 3, test: int = 2, sides: Size = (40, 60)) -> Path:
    """An archive `PASCALContext`: every image has its own size, every third nobody in it."""
    root, rng = folder / "PASCALContext", np.random.default_rng(1)
    names = [f"2008_{13 * k + 2:06}" for k in range(train + test)]
    write_list(root / "ImageSets/Context/train.txt", names[:train])
    write_list(root / "ImageSets/Context/val.txt", names[train:])
    for k, name in enumerate(names):
        size = (int(rng.integers(*sides)), int(rng.integers(*sides)))
        save(root / f"JPEGImages/{name}.jpg", picture(rng, size))
        save(root / f"normals_distill/{name}.png", picture(rng, size))
        save(root / f"sal_distill/{name}.png", blocks(rng, size, np.arange(256, dtype=np.uint8)))
        classes = blocks(rng, size, np.array([0, 1, 15, 20, 255], np.uint8))
        folder_of_classes = "VOC12" if k % 2 == 0 else "pascal-context"
        save(root / f"semseg/{folder_of_classes}/{name}.png", classes)
        regions = blocks(rng, size, np.array([3, 4, 427, 458, 0, 1], np.uint16), cell=9)
        path = root / f"pascal-context/trainval/{name}.mat"
        path.parent.mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(path, {"LabelMap": regions})
        head = np.zeros(size, bool)
        head[5:12, 4:20] = True
        body = np.zeros(size, bool)
        body[10:30, 8:22] = True
        parts = {"head": head, "torso": body}
        legs = {"luleg": np.roll(body, 12, 0)}
        objects = [person(parts, 13)] if k % 3 == 2 else [person(parts), person(legs)]
        save_people(root / f"human_parts/{name}.mat", objects)
    return root
