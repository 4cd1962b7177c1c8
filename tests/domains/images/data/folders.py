"""A folder of one's own: small images with all kinds of labels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (12, 16)
NAMES = ("soil", "crop", "weed")


def scene(index: int, size: tuple[int, int] = SIZE) -> dict[str, np.ndarray]:
    """An image and its labels; most differ from image to image."""
    rng = np.random.default_rng(index)
    rows, columns = np.indices(size)
    classes = ((columns + 2 * rows + 3 * index) // 6 % len(NAMES)).astype(np.uint8)
    image = (60 * classes[..., None] + rng.integers(0, 60, (*size, 3))).astype(np.uint8)
    normals = np.zeros((*size, 3), np.float32)
    normals[..., 2], normals[: size[0] // 2] = 1, (0.6, 0, 0.8)
    classes[0, :3] = 255
    return {
        "images": image,
        "semseg": classes,
        "edge": (np.diff(classes, prepend=classes[:, :1], axis=1) != 0).astype(np.uint8),
        "depth": np.rint(1000 * (0.5 + rows / 4 + rng.random(size))).astype(np.uint16),
        "normals": normals,
    }


def save(path: Path, values: np.ndarray) -> None:
    """A picture or an array, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path)


def write(root: Path, index: int, size: tuple[int, int] = SIZE) -> None:
    """One image and its labels."""
    made, name = scene(index, size), f"plot{index}.png"
    save(root / "images" / name, made["images"])
    save(root / "semseg" / name, made["semseg"])
    save(root / "edge" / name, made["edge"] * np.uint8(255))
    save(root / "depth" / name, made["depth"])
    save(root / "normals" / f"plot{index}.npy", made["normals"])


def make(root: Path, count: int = 8, size: tuple[int, int] = SIZE) -> Path:
    """A folder of so many images, all of whose files are right."""
    for index in range(count):
        write(root, index, size)
    rows = [f"plot{i},{'dry' if i % 3 else 'wet'}" for i in range(count)]
    (root / "scene.csv").write_text("image,class\n" + "\n".join(rows))
    say(root)
    return root


def say(root: Path, **changes: object) -> None:
    """Write `folder.json`; a value of None leaves the name out."""
    said = {"classes": {"semseg": NAMES}, "depth": {"unit": "mm"}} | changes
    text = json.dumps({name: value for name, value in said.items() if value is not None})
    (root / "folder.json").write_text(text)
