"""Parquet files and folders of the package `datasets` as own data, and sentences for wrong ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moezoo.domains.images.data.folder import reader, survey
from moezoo.errors import UserError
from tests.domains.images.data import folders, table_files

pa = pytest.importorskip("pyarrow", reason="pip install 'moezoo[tables]'")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.mark.parametrize("make", [table_files.parquet, table_files.saved])
def test_rows_are_images_with_their_labels(make: Callable[..., Path], tmp_path: Path) -> None:
    root = make(tmp_path / "own")
    found = reader.look(root)
    assert found.tasks == ("semseg", "edge", "scene")
    assert {split: len(names) for split, names in found.splits.items()} == table_files.COUNT
    assert found.labels["semseg"].names == ("class 0", "class 1", "class 2")
    assert found.labels["scene"].names == table_files.WORDS
    for split, first in (("train", 0), ("test", 6)):
        data = reader.open_folder(root, split, folders.SIZE)
        for index in range(len(data)):
            wanted, example = folders.scene(first + index), data[index]
            np.testing.assert_array_equal(example["image"], wanted["images"])
            np.testing.assert_array_equal(example["semseg"], wanted["semseg"])
            np.testing.assert_array_equal(example["edge"], wanted["edge"])
            assert example["scene"] == (first + index) % 2


def test_the_dry_run_counts_and_draws(tmp_path: Path) -> None:
    root = table_files.parquet(tmp_path / "own")
    found = survey.survey(root)
    assert not found.faults and found.sizes == {folders.SIZE: 8}
    assert found.counts["semseg"].images["test"].tolist() == [2, 2, 2]
    columns = [list(column.shown) for column in survey.sheet(found, 2)]
    assert columns == [["image"], ["semseg"], ["edge"], ["scene"]]


def test_one_file_is_divided_by_its_rows(tmp_path: Path) -> None:
    pq.write_table(table_files.table(8), tmp_path / "rooms.parquet")
    first = reader.look(tmp_path).splits
    assert sorted((*first["train"], *first["test"])) == [f"{i:06}" for i in range(8)]
    assert first["train"] and first["test"]
    (tmp_path / "folder.json").write_text('{"test": ["000003"]}')
    assert reader.look(tmp_path).splits["test"] == ("000003",)
    (tmp_path / "folder.json").write_text('{"test": ["3"]}')
    with pytest.raises(UserError, match="Unknown row in test of .*folder.json' '3'"):
        reader.look(tmp_path)


def test_a_further_split_and_columns_left_out_are_told(tmp_path: Path) -> None:
    root = table_files.parquet(tmp_path / "own")
    shutil.copy(root / "data/test-00000-of-00001.parquet", root / "data/validation.parquet")
    for path in (root / "data").iterdir():
        old = pq.read_table(path)
        pq.write_table(old.append_column("other", old.column("image")), path)
    notes = survey.notes(survey.survey(root), folders.SIZE)
    assert "The split validation is left out." in notes
    assert "The column other is left out." in notes


def test_other_columns_are_named_and_words_are_classes(tmp_path: Path) -> None:
    words = [["kitchen", "bath", None][i % 3] for i in range(8)]
    rows = table_files.table(8, scene=None, place=words)
    pq.write_table(
        rows.rename_columns(["pixels", "areas", "edge", "note", "place"]), tmp_path / "a.parquet"
    )
    with pytest.raises(
        UserError, match='no column image of pictures, only pixels, areas, .* "columns"'
    ):
        reader.look(tmp_path)
    said = {"columns": {"image": "pixels", "semseg": "areas", "scene": "place"}}
    said |= {"classes": {"semseg": list(folders.NAMES)}}
    (tmp_path / "folder.json").write_text(json.dumps(said))
    found = reader.look(tmp_path)
    assert found.labels["semseg"].names == folders.NAMES
    assert found.labels["scene"].names == ("bath", "kitchen")
    assert [int(found.label("scene", n)) for n in found.names[:3]] == [1, 0, 255]


def third(value: Any, kind: str = "images") -> list[Any]:
    """The images of a table, or its maps of another kind, of which the third is another."""
    images = [table_files.png(folders.scene(i)[kind]) for i in range(4)]
    return [*images[:2], value, images[3]]


WRONG = np.full(folders.SIZE, 7, np.uint8)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": third({"bytes": b"x", "path": None})}, "row 2, column image"),
        ({"image": third(None)}, "row 2, column image, is empty"),
        ({"image": third({"bytes": None, "path": "a.png"})}, "names the file 'a.png' without"),
        (
            {"mask": third(table_files.png(WRONG[:5] * 0), "semseg")},
            "row 2, column mask has 5 x 16 pixels",
        ),
        ({"edge": third(table_files.png(WRONG), "edge")}, "row 2, column edge has the numbers 7"),
        ({"scene": [0, 1, 2, 0]}, "row 2, column scene is the class 2, but scene has the classes"),
        ({"edge": [1, 2, 3, 4]}, "has int64 in the column edge, but edge is read from pictures"),
        ({"mask": None, "edge": None, "scene": None}, "images, but no column of labels among"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_row(
    tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    root = table_files.parquet(tmp_path / "own", **changes)
    with pytest.raises(UserError, match=sentence) as told:
        faults = survey.survey(root).faults
        assert len(faults) <= 1
        raise UserError(faults[0] if faults else "nothing")
    assert "train-00000-of-00002.parquet'" in str(told.value) and "\n" not in str(told.value)


def test_files_that_are_damaged_missing_or_of_another_form_are_told(tmp_path: Path) -> None:
    root = table_files.parquet(tmp_path / "own")
    second = root / "data/train-00001-of-00002.parquet"
    pq.write_table(table_files.table(2, 4, edge=None), second)
    with pytest.raises(UserError, match="Unknown column in .*train-00001-of-00002.parquet' 'edge'"):
        reader.look(root)
    second.write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(UserError, match="train-00001.* cannot be read as a table"):
        reader.look(root)
    second.unlink()
    (root / "data/test-00000-of-00001.parquet").rename(root / "data/rest.parquet")
    with pytest.raises(
        UserError, match="has the splits rest, train: give it one whose name begins"
    ):
        reader.look(root)
    saved = table_files.saved(tmp_path / "saved")
    arrow = saved / "train/data-00000-of-00001.arrow"
    content = arrow.read_bytes()
    arrow.write_bytes(content[:500])
    with pytest.raises(UserError, match="arrow' cannot be read as a table"):
        reader.look(saved)
    arrow.unlink()
    with pytest.raises(UserError, match="arrow' is missing"):
        reader.look(saved)
    (saved / "train/state.json").write_text('{"_data_files": [{"filename": "../x"}]}')
    with pytest.raises(UserError, match="state.json' is not as it should be"):
        reader.look(saved)


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = table_files.parquet(tmp_path / "own")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs the package pyarrow: pip install 'moezoo\[tables"):
        reader.look(root)
