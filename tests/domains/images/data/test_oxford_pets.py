"""The Oxford-IIIT Pet data set: labels by hand, files to examples to batches, damaged files."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moezoo.data.source import ArraySource, Source
from moezoo.domains.images.data import oxford_pets, oxford_pets_builder
from moezoo.domains.images.data.batches import evaluation
from moezoo.domains.images.data.batches import training as Training
from moezoo.domains.images.data.preview import contact_sheet
from moezoo.domains.images.data.tfds_source import convert
from moezoo.domains.images.domain import MAPPED, DataConfig, form_of, open_source
from moezoo.errors import UserError
from tests.domains.images.data import pets

PETS = "oxford_iiit_pet"
SIZE = (24, 40)


def test_labels_of_a_trimap_by_hand() -> None:
    example = convert(MAPPED[PETS], pets.record(pets.TRIMAP), (6, 6))
    np.testing.assert_array_equal(example["semseg"], np.array(pets.TRIMAP) - 1)
    row = [0, 255, 1, 1, 255, 0]
    np.testing.assert_array_equal(example["saliency"][2], row)
    np.testing.assert_array_equal(example["saliency"][1], [0, 255, 255, 255, 255, 0])
    np.testing.assert_array_equal(example["edge"][2], [0, 1, 0, 0, 1, 0])
    assert not example["edge"][[0, 5]].any() and not example["edge"][2:4, 2:4].any()
    assert example["scene"] == 4 and {v.dtype for v in example.values()} == {np.dtype(np.uint8)}
    assert (
        convert(MAPPED["oxford_iiit_pet_species"], pets.record(pets.TRIMAP), (6, 6))["scene"] == 1
    )


def test_a_wide_border_becomes_a_thin_line() -> None:
    wide = np.full((9, 12), 2)
    wide[:, 6:] = 1
    wide[:, 4:7] = 3
    lines = oxford_pets.outline(pets.record(wide))
    assert (lines[1:-1].sum(1) == 1).all() and set(np.nonzero(lines[1:-1])[1]) == {5}


def test_without_a_border_the_line_is_where_both_touch() -> None:
    halves = np.full((9, 12), 2)
    halves[:, 6:] = 1
    lines = oxford_pets.outline(pets.record(halves))
    assert (lines.sum(1) == 1).all() and set(np.nonzero(lines)[1]) == {6}
    assert not oxford_pets.outline(pets.record(np.full((4, 4), 1))).any()


def as_jpeg(path: Path) -> np.ndarray:
    """A picture; one that is no JPEG after being encoded as one."""
    with Image.open(path) as picture:
        if picture.format == "JPEG":
            return np.asarray(picture)
        buffer = BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=95)
    return np.asarray(Image.open(buffer))


def test_records_hold_what_the_files_hold(pets_place: Path, pets_config: DataConfig) -> None:
    for split, listed in (("train", "trainval.txt"), ("test", "test.txt")):
        source = open_source(pets_config, split)
        lines = (pets_place / "annotations" / listed).read_text().splitlines()[1:]
        assert isinstance(source, Source) and len(source) == len(lines) > 2
        assert source.info.tasks == ("semseg", "saliency", "edge", "scene")
        for index, line in enumerate(lines):
            name, label, species, _ = line.split()
            image = as_jpeg(pets_place / f"images/{name}.jpg")
            with Image.open(pets_place / f"annotations/trimaps/{name}.png") as picture:
                trimap = np.asarray(picture)
            given = {"label": int(label) - 1, "image": image}
            wanted = convert(MAPPED[PETS], pets.record(trimap, **given), SIZE)
            found = source[index]
            assert found.keys() == wanted.keys()
            for key, value in found.items():
                np.testing.assert_array_equal(value, wanted[key])


def test_both_mappings_share_what_is_stored(pets_place: Path, pets_config: DataConfig) -> None:
    source = open_source(replace(pets_config, name="oxford_iiit_pet_species"), "train")
    assert [int(source[k]["scene"]) for k in range(4)] == [0, 1, 1, 0]
    assert source.info.labels["scene"].names == ("cat", "dog")
    assert open_source(pets_config, "train").info.labels["scene"].classes == 37
    assert len(list((pets_place / "data/oxford_pets").glob("*/1.0.0"))) == 1
    assert not list((pets_place / "data").glob("**/*incomplete*"))
    assert not (pets_place / "data/downloads").exists()


def test_a_batch_is_a_function_of_its_step(pets_config: DataConfig) -> None:
    first, second = (Training(open_source(pets_config, "train"), 6, 3) for _ in range(2))
    batch = first.batch(2)
    assert batch["image"].shape == (6, *SIZE, 3) and batch["scene"].shape == (6,)
    for key, value in batch.items():
        np.testing.assert_array_equal(value, second.batch(2)[key])
        np.testing.assert_array_equal(value, first.batch(2)[key])  # now remembered
    assert len(list(evaluation(open_source(pets_config, "test"), 2))) == 2


def test_the_form_of_a_batch_without_any_data(pets_config: DataConfig) -> None:
    blank, real = form_of(replace(pets_config, archive=None, data_dir="/nowhere")), pets_config
    source = open_source(real, "train")
    assert isinstance(blank, ArraySource) and blank.info == source.info
    one, other = (Training(s, 2, 0).batch(0) for s in (blank, source))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
        k: (v.shape, v.dtype) for k, v in other.items()
    }


def test_an_earlier_conversion_needs_no_archive(pets_config: DataConfig) -> None:
    open_source(pets_config, "test")
    again = open_source(replace(pets_config, archive=None), "test")
    np.testing.assert_array_equal(again[0]["semseg"], open_source(pets_config, "test")[0]["semseg"])


def test_a_contact_sheet(pets_config: DataConfig) -> None:
    assert contact_sheet(open_source(pets_config, "test"), range(2)).shape == (2 * 24, 4 * 40, 3)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        (
            "annotations/test.txt",
            "cat_1 38 1 1\n",
            "gives 'cat_1' the breed 38, but there are 1 to",
        ),
        ("annotations/test.txt", "cat_1 3 0 1\n", "the species 0, but there are 1 to 2"),
        ("annotations/test.txt", "cat_1 3\n", "has the line 'cat_1 3', but name, breed"),
        ("annotations/test.txt", "# none\n", "lists no pictures"),
        ("annotations/test.txt", None, "test.txt' is missing: unpack annotations.tar.gz again"),
        ("annotations/test.txt", "cat_1 3 1 1\n", "cat_1.jpg' cannot be read as a picture"),
        ("images/Abyssinian_1.jpg", "", "Abyssinian_1.jpg' cannot be read as a picture"),
        ("annotations/trimaps/beagle_2.png", None, "beagle_2.png' cannot be read"),
    ],
)
def test_a_damaged_file(
    file: str, content: str | None, words: str, pets_config: DataConfig, tmp_path: Path
) -> None:
    root = pets.make_pets(tmp_path / "pets")
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_text(content)
    given = replace(pets_config, archive=str(root), data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=words):
        open_source(given, "train")
    assert pets.nothing_left(tmp_path / "data")


def test_a_value_that_no_trimap_has(pets_config: DataConfig, tmp_path: Path) -> None:
    root = pets.make_pets(tmp_path / "pets")
    path = root / "annotations/trimaps/beagle_2.png"
    Image.fromarray(np.full((30, 30), 4, np.uint8)).save(path)
    given = replace(pets_config, archive=str(root), data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match="value 4 at row 0, but a trimap has 1, 2 and 3"):
        open_source(given, "train")
    assert pets.nothing_left(tmp_path / "data")


def test_no_folder_and_damaged_records(pets_config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.archive is '/nowhere', which is not a folder"):
        open_source(replace(pets_config, archive="/nowhere"), "train")
    root = pets.make_pets(tmp_path / "pets")
    given = replace(pets_config, archive=str(root), data_dir=str(tmp_path / "data"))
    open_source(given, "train")
    [shard] = (tmp_path / "data").glob("**/*train.array_record*")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged.*; delete that folder"):
        open_source(given, "train")


def test_lists_that_an_editor_saved(tmp_path: Path) -> None:
    folder = pets.make_pets(tmp_path) / "annotations"
    plain = oxford_pets_builder.entries(folder, "test")
    path = folder / "test.txt"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert oxford_pets_builder.entries(folder, "test") == plain
