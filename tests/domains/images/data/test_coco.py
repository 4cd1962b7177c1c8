"""COCO's annotations as maps of classes, and a sentence for every kind of wrong file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moezoo.domains.images.data.folder import coco, reader, survey
from moezoo.errors import UserError
from tests.domains.images.data import coco_files, folders
from tests.domains.images.data.coco_files import SIZE, TRUTH, make, make_panoptic

pytest.importorskip("pycocotools", reason="pip install 'moezoo[coco]'")


@pytest.fixture
def street(tmp_path: Path) -> Path:
    return make(tmp_path / "street")


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_objects_become_maps_of_classes(street: Path) -> None:
    found = reader.look(street)
    assert found.tasks == ("semseg",)
    assert found.labels["semseg"].names == ("background", "car", "sky", "wheel")
    assert {split: len(names) for split, names in found.splits.items()} == {"train": 6, "test": 2}
    for name in found.names:
        label = found.label("semseg", name)
        assert label.dtype == np.uint8
        np.testing.assert_array_equal(label, TRUTH)
    example = reader.open_folder(street, "test", SIZE)[0]
    np.testing.assert_array_equal(example["semseg"], TRUTH)
    assert example["image"].shape == (*SIZE, 3)


def test_exports_of_tools_lie_beside_their_images(tmp_path: Path) -> None:
    exported = make(tmp_path / "exported", exported=True)
    found = reader.look(exported)
    assert len(found.splits["train"]) == 6 and len(found.splits["test"]) == 2
    np.testing.assert_array_equal(found.label("semseg", found.names[0]), TRUTH)


def test_of_two_test_splits_one_is_left_out_and_told(street: Path) -> None:
    before = street / "annotations/instances_val.json"
    (street / "annotations/instances_test.json").write_text(before.read_text())
    (street / "val").rename(street / "test")
    notes = survey.notes(survey.survey(street), SIZE)
    assert any("instances_val.json' is left out" in note for note in notes)


def test_panoptic_pictures_become_maps_of_classes(tmp_path: Path) -> None:
    root = make_panoptic(tmp_path / "street")
    found = reader.look(root)
    assert found.labels["semseg"].names == ("car", "sky", "wheel")
    expected = np.where(TRUTH == 0, 255, TRUTH.astype(int) - 1)
    for name in found.names:
        np.testing.assert_array_equal(found.label("semseg", name), expected)
    make(root)
    with pytest.raises(UserError, match='say in folder.json which .* "annotations": "panoptic"'):
        reader.look(root)
    (root / "folder.json").write_text('{"annotations": "instances"}')
    assert reader.look(root).labels["semseg"].names[0] == "background"


def test_packed_run_lengths_are_read_as_the_library_does() -> None:
    from pycocotools import mask

    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        drawn = np.asfortranarray(rng.random((70, 90)) < share, np.uint8)
        drawn[30:60] &= 0  # runs of more than five, and of more than ten bits
        runs = coco._unpacked(mask.encode(drawn)["counts"].decode())
        wanted = coco_files.counts(drawn.astype(bool))
        assert runs == wanted


def test_the_dry_run_counts_classes(street: Path) -> None:
    found = survey.survey(street)
    assert not found.faults and found.sizes == {SIZE: 8}
    counts = found.counts["semseg"].classes
    np.testing.assert_array_equal(counts["test"], 2 * np.bincount(TRUTH.ravel(), minlength=4))
    assert [list(c.shown) for c in survey.sheet(found, 2)] == [["image"], ["semseg"]]


def segmentation(value: object) -> Callable[[Any], object]:
    return lambda d: d["annotations"][0].update(segmentation=value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d["annotations"][0].update(image_id=99), "image_id 99, which is none"),
        (lambda d: d["annotations"][0].update(category_id=99), "category_id 99, which is none"),
        (lambda d: d["images"].append(d["images"][0]), "has the image 0 twice"),
        (lambda d: d["images"][0].update(file_name="x.png"), "image 'x.png', which is not there"),
        (lambda d: d["images"][0].update(file_name="../x.png"), "'../x.png', which lies elsewhere"),
        (lambda d: d["images"][0].update(height=13), "has 13 x 16 pixels, but its image .* 12 x"),
        (lambda d: d["categories"].append(d["categories"][0]), "category 9, 'wheel', twice"),
        (lambda d: d["categories"].append({"id": 1, "name": "x"}), "other categories than"),
        (lambda d: d.pop("categories"), "categories is missing"),
        (lambda d: d["images"].clear(), "images has 0 entries"),
        (segmentation([]), r"annotations\[0\] whose segmentation is empty, there is only a box"),
        (segmentation([[1, 2, 3, 4]]), "a polygon of 4 numbers"),
        (segmentation([[1, 2, 3, 4, 5, 6, 7]]), "a polygon of 7 numbers"),
        (segmentation([[1, 2, 3, 4, 5, 9999]]), "a point far outside"),
        (segmentation({"size": [2, 2], "counts": [4]}), r"has the size \[2, 2\], but its image"),
        (segmentation({"size": [12, 16], "counts": [4]}), "run lengths that do not fill its image"),
        (segmentation({"size": [12, 16], "counts": "~~~~~"}), "run lengths that do not"),
        (segmentation({"size": [12, 16], "counts": "ä"}), "run lengths that do not"),
        (segmentation("x"), r"annotations\[0\].segmentation"),
    ],
)
def test_what_is_wrong_is_told_with_its_file(
    street: Path, change: Callable[[Any], object], sentence: str
) -> None:
    edit(street / "annotations/instances_train.json", change)
    with pytest.raises(UserError, match=sentence) as told:
        data = reader.open_folder(street, "train", SIZE)
        for index in range(len(data)):
            data[index]
    assert "instances_train.json'" in str(told.value) and "\n" not in str(told.value)


def test_files_that_are_missing_or_not_meant_are_told(street: Path, tmp_path: Path) -> None:
    (street / "folder.json").write_text('{"test_share": 0.5}')
    with pytest.raises(UserError, match="folder.json' has test_share, which means nothing for"):
        reader.look(street)
    (street / "folder.json").write_text('{"annotations": "panoptic"}')
    with pytest.raises(UserError, match="asks for panoptic annotations, but there are only"):
        reader.look(street)
    (street / "folder.json").unlink()
    (street / "annotations/instances_train.json").write_text("{")
    with pytest.raises(UserError, match="instances_train.json' is not as it should be, it is not"):
        reader.look(street)
    (street / "annotations/instances_train.json").unlink()
    with pytest.raises(UserError, match="no annotations of the train split, whose name begins"):
        reader.look(street)
    plain = folders.make(tmp_path / "plots")
    folders.say(plain, annotations="panoptic")
    with pytest.raises(UserError, match="has annotations, which means nothing for"):
        reader.look(plain)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda p: Image.new("L", SIZE[::-1]).save(p), "three channels of 8 bits"),
        (lambda p: Image.new("RGB", (3, 3)).save(p), "has 3 x 3 pixels, but .* says 12 x 16"),
        (lambda p: Image.new("RGB", SIZE[::-1], (77, 0, 0)).save(p), "has the segment 77, which"),
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(b"x"), "replace the file"),
    ],
)
def test_wrong_panoptic_pictures_are_told(
    tmp_path: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    root = make_panoptic(tmp_path / "street")
    damage(root / "annotations/panoptic_train/a0.png")
    faults = survey.survey(root).faults
    assert len(faults) == 1
    with pytest.raises(UserError, match=sentence):
        raise UserError(faults[0])
    assert "panoptic_train/a0.png'" in faults[0]


def test_without_the_library_the_extra_is_named(
    street: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pycocotools", None)
    found = reader.look(street)
    with pytest.raises(UserError, match=r"needs the package pycocotools: pip install 'moezoo\["):
        found.label("semseg", found.names[0])
