"""Small archives in the layout of the Oxford-IIIT Pet data set, made from ellipses."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.domains.images.data.archives import picture, save

BREEDS = (("Abyssinian", 1, 1), ("beagle", 5, 2), ("yorkshire_terrier", 37, 2))


def trimap(size: tuple[int, int]) -> np.ndarray:
    """An ellipse of 1 in 2, a border of 3 between them."""
    rows, columns = (np.linspace(-1.0, 1.0, n) for n in size)
    radius = np.hypot(rows[:, None], columns)
    return np.select([radius < 0.5, radius < 0.65], [1, 3], 2).astype(np.uint8)


def make_pets(folder: Path, train: int = 4, test: int = 3) -> Path:
    """Unpacked folders `images` and `annotations`; every image has its own size."""
    rng = np.random.default_rng(2)
    lists: dict[str, list[str]] = {"trainval.txt": [], "test.txt": []}
    for k in range(train + test):
        breed, label, species = BREEDS[k % len(BREEDS)]
        size = (int(rng.integers(30, 50)), int(rng.integers(30, 60)))
        name = f"{breed}_{k + 1}"
        save(folder / f"images/{name}.jpg", picture(rng, size))
        save(folder / f"annotations/trimaps/{name}.png", trimap(size))
        lists["trainval.txt" if k < train else "test.txt"].append(f"{name} {label} {species} 1\n")
    for name, lines in lists.items():
        (folder / "annotations" / name).write_text(
            "#Image CLASS-ID SPECIES BREED\n" + "".join(lines)
        )
    return folder


def disguise(path: Path) -> None:
    """The picture as a PNG with alpha under its old name, as the archive has some."""
    with Image.open(path) as picture_:
        picture_.convert("RGBA").save(path, "PNG")


def pack(unpacked: Path, folder: Path) -> Path:
    """The two archives; like the real ones, tar files that are not compressed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("images", "annotations"):
        with tarfile.open(folder / f"{name}.tar.gz", "w") as archive:
            archive.add(unpacked / name, name)
    return folder


TRIMAP = [
    [2, 2, 2, 2, 2, 2],
    [2, 3, 3, 3, 3, 2],
    [2, 3, 1, 1, 3, 2],
    [2, 3, 1, 1, 3, 2],
    [2, 3, 3, 3, 3, 2],
    [2, 2, 2, 2, 2, 2],
]


def record(trimap: Any, **more: Any) -> dict[str, Any]:
    """A decoded record with this trimap."""
    mask = np.asarray(trimap, np.uint8)[..., None]
    image = np.zeros((*mask.shape[:2], 3), np.uint8)
    return {"image": image, "segmentation_mask": mask, "label": 4, "species": 1, **more}


def nothing_left(data: Path) -> bool:
    """No file but locks."""
    return not [p for p in data.glob("**/*") if p.is_file() and p.name != ".lock"]
