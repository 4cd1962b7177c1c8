"""Records of tfds data sets as examples: resizing, checks, memory, another builder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.domains.images.data import oxford_pets, resample
from moezoo.domains.images.data import tfds_source as mapped
from moezoo.domains.images.data.tfds_source import Mapped, convert
from moezoo.domains.images.domain import MAPPED
from moezoo.errors import UserError
from tests.data import toy
from tests.domains.images.data import pets

PETS = "oxford_iiit_pet"
SIZE = (24, 40)


def test_pictures_are_resized_before_labels_are_made() -> None:
    rng = np.random.default_rng(0)
    given = pets.record(rng.integers(1, 4, (7, 5)), image=rng.integers(0, 256, (9, 4, 3), np.uint8))
    example = convert(MAPPED[PETS], given, SIZE)
    wanted = resample.nearest(given["segmentation_mask"], SIZE)
    np.testing.assert_array_equal(example["semseg"], wanted[..., 0] - 1)
    edges = oxford_pets.outline({"segmentation_mask": wanted})
    np.testing.assert_array_equal(example["edge"], edges)
    image = np.rint(resample.linear(given["image"], SIZE)).astype(np.uint8)
    np.testing.assert_array_equal(example["image"], image)
    twice = convert(MAPPED[PETS], pets.record([[1, 2]], image=np.full((1, 2, 1), 7)), (8, 8))
    np.testing.assert_array_equal(twice["image"], np.full((8, 8, 3), 7))
    np.testing.assert_array_equal(twice["semseg"], np.repeat([[0, 1]], 8, 0).repeat(4, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": 37}, "scene has the class 37, but classes are 0 to 36"),
        ({"label": -1}, "scene has the class -1"),
        ({"label": np.zeros(2)}, r"scene has the shape \(2,\), not \(\)"),
        ({"segmentation_mask": np.full((6, 6, 1), 4)}, "semseg has the class 3"),
        ({"segmentation_mask": np.full((6, 6, 1), 0)}, "semseg has the class -1"),
    ],
)
def test_classes_out_of_range(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        convert(MAPPED[PETS], pets.record(pets.TRIMAP) | changes, (6, 6))


def test_a_wrong_example_is_named() -> None:
    source = mapped.Mapped(
        mapped.describe(MAPPED[PETS], "test", (6, 6)),
        [pets.record(pets.TRIMAP), pets.record(pets.TRIMAP, label=99)],
        MAPPED[PETS],
    )
    assert source[-2]["scene"] == 4
    with pytest.raises(UserError, match=r"Example 1 of oxford_iiit_pet \(test\): scene has"):
        source[1]
    with pytest.raises(IndexError):
        source[2]


def test_examples_are_decoded_once_where_they_fit() -> None:
    class Counted(list):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    info = mapped.describe(MAPPED[PETS], "train", (6, 6))
    for remember, reads in ((True, 1), (False, 3)):
        records = Counted([pets.record(pets.TRIMAP)])
        source = Mapped(info, records, MAPPED[PETS], remember)
        for _ in range(3):
            source[0].pop("image")  # a caller's own dictionary
        assert records.reads == reads


def test_any_tfds_data_set(tmp_path: Path) -> None:
    train = mapped.open_mapped(toy.MAPPING, (10, 12), "train", data_dir=tmp_path)
    test = mapped.open_mapped(toy.MAPPING, (10, 12), "test", data_dir=tmp_path)
    assert (len(train), len(test)) == (3, 10)
    example = test[2]
    assert (example["image"] == 2).all() and example["image"].shape == (10, 12, 3)
    assert (example["semseg"] == 255).all() and (test[4]["semseg"] == 1).all()
    assert (example["depth"] == 2).all() and example["depth"].dtype == np.float32
    assert (tmp_path / "mapped_toy/2.1.0").is_dir() and not (tmp_path / "downloads").exists()
