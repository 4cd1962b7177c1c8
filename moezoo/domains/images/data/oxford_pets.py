"""The Oxford-IIIT Pet data set: a trimap of one cat or dog per image, its breed and species.

Parkhi et al., CVPR 2012. semseg: pet, background and border as three classes, as in most work that
trains on the trimap. saliency: the pet, the border ignored. edge: the middle line of the border, or
where pet and background touch their common line. scene: the breed, or in `oxford_iiit_pet_species`
cat or dog. Edges and saliency are our choice: nobody publishes scores for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data.source import Labels
from moezoo.domains.images.data.dense.names import (
    BACKGROUND,
    BORDER,
    BREEDS,
    PET,
    SPECIES,
    voc_palette,
)
from moezoo.domains.images.data.padding import UNLABELLED
from moezoo.domains.images.data.tfds_source import TfdsMapping, TfdsRecord
from moezoo.domains.images.thinning import thin
from moezoo.label import BINARY, CLASSES, IMAGE

REGIONS = ("pet", "background", "border")


def regions(record: TfdsRecord) -> np.ndarray:
    """Classes [H,W]: 0 pet, 1 background, 2 border."""
    return record["segmentation_mask"][..., 0].astype(np.int16) - 1


def pet(record: TfdsRecord) -> np.ndarray:
    """1 on the pet, 0 on the background, 255 on the border [H,W]."""
    trimap = record["segmentation_mask"][..., 0]
    return np.where(trimap == BORDER, UNLABELLED, trimap == PET)


def outline(record: TfdsRecord) -> np.ndarray:
    """The pet's boundary [H,W] 0/1, one pixel wide.

    The thinned border, or, if shrinking or the annotation left no border, the pet's last pixels
    beside the background.
    """
    trimap = np.pad(record["segmentation_mask"][..., 0], 1, mode="edge")
    outside = trimap == BACKGROUND
    beside = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
    inner = trimap[1:-1, 1:-1]
    return thin((inner == BORDER) | ((inner == PET) & beside))


def breed(record: TfdsRecord) -> np.ndarray:
    """The number of the breed."""
    return np.asarray(record["label"])


def species(record: TfdsRecord) -> np.ndarray:
    """0 cat, 1 dog."""
    return np.asarray(record["species"])


def _open(dataset: str, given: Path | None, data_dir: Path) -> Any:
    from moezoo.domains.images.data import oxford_pets_builder

    return oxford_pets_builder.open_builder(given, data_dir)


def _mapping(name: str, of_image: Any, names: tuple[str, ...]) -> TfdsMapping:
    return TfdsMapping(
        name=name,
        dataset="oxford_iiit_pet",
        splits={"train": "train", "test": "test"},
        maps=("segmentation_mask",),
        tasks={"semseg": regions, "saliency": pet, "edge": outline, "scene": of_image},
        kinds={"semseg": CLASSES, "saliency": BINARY, "edge": BINARY, "scene": IMAGE},
        labels={
            "semseg": Labels(REGIONS, voc_palette(len(REGIONS) + 1)[1:]),
            "scene": Labels(names, voc_palette(len(names) + 1)[1:]),
        },
        builder=_open,
    )


BY_BREED = _mapping("oxford_iiit_pet", breed, BREEDS)
BY_SPECIES = _mapping("oxford_iiit_pet_species", species, SPECIES)
