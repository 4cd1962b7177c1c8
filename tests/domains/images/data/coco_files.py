"""Small data sets with COCO's annotations, in all three forms of masks, and what they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.domains.images.data import folders

SIZE = folders.SIZE
# By the numbers of classes: background, car (category 3), sky (5), wheel (9).
CAR, SKY, WHEEL = (slice(5, 11), slice(2, 12)), (slice(0, 5), slice(0, 16)), (slice(8, 11), 4)
TRUTH = np.zeros(SIZE, np.uint8)
TRUTH[CAR], TRUTH[SKY], TRUTH[WHEEL] = 1, 2, 3
# Not in the order of their numbers.
CATEGORIES = [{"id": 9, "name": "wheel"}, {"id": 3, "name": "car"}, {"id": 5, "name": "sky"}]
IMAGES = {"train": 6, "val": 2}


def counts(mask: np.ndarray) -> list[int]:
    """Lengths of runs, column by column, beginning with what is outside."""
    flat = mask.T.ravel()
    edges = [0, *(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    lengths = [b - a for a, b in zip(edges, edges[1:], strict=False)]
    return [0, *lengths] if flat[0] else lengths


def runs(where: Any) -> dict[str, Any]:
    mask = np.zeros(SIZE, bool)
    mask[where] = True
    return {"size": list(SIZE), "counts": counts(mask)}


def packed(where: Any) -> dict[str, Any]:
    from pycocotools import mask

    made = mask.frPyObjects(runs(where), *SIZE)
    return {"size": list(SIZE), "counts": made["counts"].decode()}


def objects(image: int) -> list[dict[str, Any]]:
    """A wheel on a car before the sky: run lengths, a polygon, packed run lengths."""
    (top, bottom), (left, right) = ((s.start, s.stop) for s in CAR)
    polygon = [left, top, right, top, right, bottom, left, bottom]
    drawn = ((9, runs(WHEEL)), (3, [polygon]), (5, packed(SKY)))
    return [{"image_id": image, "category_id": c, "segmentation": s} for c, s in drawn]


def write_images(folder: Path, split: str, count: int) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for index in range(count):
        name = f"{split[0].replace('t', 'a').replace('v', 'b')}{index}.png"
        Image.fromarray(folders.scene(index)["images"]).save(folder / name)
        listed.append({"id": index, "file_name": name, "height": SIZE[0], "width": SIZE[1]})
    return listed


def make(root: Path, exported: bool = False) -> Path:
    """As COCO itself lies, or as tools export it, beside the images."""
    for split, count in IMAGES.items():
        folder = root / ({"val": "valid"}.get(split, split) if exported else split)
        listed = write_images(folder, split, count)
        drawn = [one for index in range(count) for one in objects(index)]
        content = {"images": listed, "annotations": drawn, "categories": CATEGORIES}
        file = root / "annotations" / f"instances_{split}.json"
        file = folder / "_annotations.coco.json" if exported else file
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return root


def make_panoptic(root: Path) -> Path:
    """Pictures whose colours are numbers of segments, above 255 and 65535, too."""
    numbers = {1: 300, 2: 7, 3: 70000}  # by class
    for split, count in IMAGES.items():
        listed = write_images(root / split, split, count)
        pictures = root / "annotations" / f"panoptic_{split}"
        pictures.mkdir(parents=True)
        drawn = []
        for one in listed:
            ids = np.zeros(SIZE, np.int64)
            for number, segment in numbers.items():
                ids[number == TRUTH] = segment
            rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
            Image.fromarray(rgb).save(pictures / one["file_name"])
            named = zip(numbers.values(), (3, 5, 9), strict=True)
            info = [{"id": number, "category_id": category} for number, category in named]
            entry = {"image_id": one["id"], "file_name": one["file_name"], "segments_info": info}
            drawn.append(entry)
        content = {"images": listed, "annotations": drawn, "categories": CATEGORIES}
        (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content))
    return root
