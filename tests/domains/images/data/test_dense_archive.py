"""Whatever is wrong with an archive is one clear sentence, and nothing half written stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from moezoo.domains.images.data.dense import archive, builder, nyud, pascal
from moezoo.domains.images.data.dense import reader as store
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.errors import UserError
from tests.domains.images.data import archives
from tests.fixtures import ROOT
from tests.robustness import fuzz

ID, FIRST = "0001", "2008_000002"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("archives")
    archives.make_nyud(where)
    archives.make_pascal(where)
    return where


@pytest.fixture
def place(kept: Path, tmp_path: Path) -> Path:
    """Both archives, to be damaged."""
    shutil.copytree(kept, tmp_path / "archives")
    return tmp_path / "archives"


def config(name: str, place: Path) -> DataConfig:
    size = (448, 576) if name == "nyud" else (64, 64)
    layout = builder.LAYOUTS[name]
    root, data = place / layout.folder, place.parent / "data"
    return DataConfig(name=name, resolution=size, archive=str(root), data_dir=str(data))


def listed(root: Path, text: str) -> None:
    (root / "gt_sets/val.txt").write_text(text)


def repaint(path: Path, value: int) -> None:
    values = np.array(Image.open(path))
    values[3, 4] = value
    archives.save(path, values)


def resized(path: Path, width: int, height: int) -> None:
    Image.open(path).resize((width, height)).save(path)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def depths(root: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = root / f"depth/{ID}.npy"
    np.save(path, change(np.load(path)))


def odd(depth: np.ndarray, value: float) -> np.ndarray:
    depth[2, 3] = value
    return depth


NYUD_FAULTS = {
    "list missing": (lambda r: (r / "gt_sets/val.txt").unlink(), "val.txt' is missing: .*NYUDv2"),
    "list empty": (lambda r: listed(r, "\n"), "val.txt' lists no ids"),
    "list of bytes": (
        lambda r: (r / "gt_sets/val.txt").write_bytes(b"\xff\xfe\x00"),
        "val.txt' cannot be read as a list",
    ),
    "id in both lists": (lambda r: listed(r, f"{ID}\n"), f"id '{ID}' occurs twice.*val.txt"),
    "folder missing": (lambda r: shutil.rmtree(r / "edge"), "edge' with the edge files is missing"),
    "id without file": (lambda r: listed(r, "0404\n"), "0404.png' is missing, but .*val.txt"),
    "depth missing": (lambda r: (r / f"depth/{ID}.npy").unlink(), f"{ID}.npy' is missing, but"),
    "other package": (
        lambda r: resized(r / f"images/{ID}.png", 640, 480),
        r"480 x 640, but .* 425 x 560 \(this is the package NYUD_MT",
    ),
    "other size": (
        lambda r: resized(r / f"normals/{ID}.png", 576, 448),
        "normals/.*448 x 576, but pictures of NYUD-v2 are 425 x 560: use",
    ),
    "no picture": (lambda r: cut(r / f"images/{ID}.png", 4), "cannot be read as a picture"),
    "half a picture": (lambda r: cut(r / f"edge/{ID}.png", 150), "cannot be read as a picture"),
    "class 41": (
        lambda r: repaint(r / f"segmentation/{ID}.png", 41),
        f"segmentation/{ID}.png' has the value 41 at row 3, but NYUD-v2 has classes 0 to 40",
    ),
    "grey edge": (lambda r: repaint(r / f"edge/{ID}.png", 7), "value 7 .*edges are 0 or 255"),
    "coloured classes": (
        lambda r: shutil.copy(r / f"images/{ID}.png", r / f"segmentation/{ID}.png"),
        "segmentation/.* is not a map of 8-bit labels",
    ),
    "negative depth": (lambda r: depths(r, lambda d: odd(d, -1)), "negative or not finite"),
    "depth NaN": (lambda r: depths(r, lambda d: odd(d, np.nan)), "negative or not finite"),
    "depth of channels": (lambda r: depths(r, lambda d: d[None]), "is not a depth map"),
    "depth of another size": (
        lambda r: depths(r, lambda d: d[1:]),
        "424 x 560, but its image is 425",
    ),
    "no array": (lambda r: cut(r / f"depth/{ID}.npy", 60), "cannot be read as a NumPy array"),
}


def annotate(root: Path, objects: list[tuple]) -> None:
    archives.save_people(root / f"human_parts/{FIRST}.mat", objects)


def matlab(path: Path, **variables: np.ndarray) -> None:
    scipy.io.savemat(path, variables)


REGIONS, PEOPLE = f"pascal-context/trainval/{FIRST}.mat", f"human_parts/{FIRST}.mat"
PASCAL_FAULTS = {
    "list missing": (
        lambda r: (r / "ImageSets/Context/train.txt").unlink(),
        "train.txt' is missing: .*PASCALContext",
    ),
    "no classes at all": (
        lambda r: (r / f"semseg/VOC12/{FIRST}.png").unlink(),
        f"semseg/VOC12/{FIRST}.png' is missing",
    ),
    "class 21": (
        lambda r: repaint(r / f"semseg/VOC12/{FIRST}.png", 21),
        "value 21 .*classes are 0 to 20, or 255",
    ),
    "half an image": (lambda r: cut(r / f"JPEGImages/{FIRST}.jpg", 400), "JPEGImages/.*a picture"),
    "no MATLAB file": (lambda r: cut(r / REGIONS, 90), "cannot be read as a MATLAB file"),
    "no regions": (lambda r: matlab(r / REGIONS, other=np.ones(3)), "no variable 'LabelMap'"),
    "fractions": (
        lambda r: matlab(r / REGIONS, LabelMap=np.full((4, 4), 0.5)),
        "contains no map of regions",
    ),
    "region 460": (
        lambda r: matlab(r / REGIONS, LabelMap=np.full((4, 4), 460, np.uint16)),
        "value 460 .*kinds of region are 0 to 459",
    ),
    "no annotation": (
        lambda r: matlab(r / PEOPLE, anno=np.zeros((2, 2))),
        "is not an annotation of objects and parts",
    ),
    "unknown part": (
        lambda r: annotate(r, [archives.person({"wing": np.ones((40, 40))})]),
        "unknown part of a person, 'wing'",
    ),
    "masks of two sizes": (
        lambda r: annotate(r, [archives.person({"head": np.ones((n, 4))}) for n in (4, 5)]),
        "is not an annotation of objects and parts",
    ),
}


def left(place: Path) -> list[Path]:
    """Files under the data directory but for locks."""
    return [p for p in (place.parent / "data").rglob("*") if p.is_file() and p.name != ".lock"]


@pytest.mark.parametrize("fault", NYUD_FAULTS)
def test_faults_of_nyud(place: Path, fault: str) -> None:
    damage, words = NYUD_FAULTS[fault]
    damage(place / nyud.LAYOUT.folder)
    with pytest.raises(UserError, match=words):
        open_source(config("nyud", place), "train")
    assert not left(place)


@pytest.mark.parametrize("fault", PASCAL_FAULTS)
def test_faults_of_pascal(place: Path, fault: str) -> None:
    damage, words = PASCAL_FAULTS[fault]
    damage(place / pascal.LAYOUT.folder)
    with pytest.raises(UserError, match=words):
        open_source(config("pascal", place), "train")
    assert not left(place)


def test_a_repaired_archive_is_converted(place: Path) -> None:
    path = place / f"PASCALContext/sal_distill/{FIRST}.png"
    whole = path.read_bytes()
    cut(path, len(whole) // 2)
    with pytest.raises(UserError, match="cannot be read"):
        open_source(config("pascal", place), "train")
    path.write_bytes(whole)
    assert len(open_source(config("pascal", place), "train")) == 3


def test_other_numbers_of_examples_are_told(place: Path, capfd: pytest.CaptureFixture) -> None:
    open_source(config("pascal", place), "test")
    told = capfd.readouterr().err
    assert "train.txt' lists 3 ids; PASCAL-Context has 4998" in told
    assert "val.txt' lists 2 ids; PASCAL-Context has 5105" in told
    open_source(config("pascal", place), "train")
    assert "lists" not in capfd.readouterr().err  # converted once


def test_where_the_archive_is(place: Path, tmp_path: Path) -> None:
    c = config("pascal", place)
    with pytest.raises(UserError, match="data.archive is '.*nowhere', which is not a folder"):
        open_source(replace(c, archive=str(place / "nowhere")), "train")
    with pytest.raises(UserError, match="--data.archive, or put it at '.*data/PASCALContext'"):
        open_source(replace(c, archive=None), "train")
    with pytest.raises(UserError, match="'.*NYUDv2' is not a PASCAL-Context archive"):
        open_source(replace(c, archive=str(place / "NYUDv2")), "train")
    parent = open_source(replace(c, archive=str(place)), "train")
    usual = open_source(replace(c, archive=None, data_dir=str(place)), "train")
    shutil.rmtree(place / "PASCALContext")
    again = open_source(replace(c, archive=None), "train")
    for source in (usual, again):
        assert len(source) == len(parent) == 3
        np.testing.assert_array_equal(source[2]["image"], parent[2]["image"])


def test_images_larger_than_the_batches(place: Path) -> None:
    c = replace(config("pascal", place), resolution=(32, 64))
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"{split} images up to .* larger than data.resolution"):
            open_source(c, split)
    assert len(open_source(replace(c, augment=("crop",)), "train")) == 3
    with pytest.raises(UserError, match="test images up to"):
        open_source(replace(c, augment=("crop",)), "test")


def test_damaged_records(place: Path) -> None:
    c = config("pascal", place)
    open_source(c, "train")
    [records] = (place.parent / "data").rglob("pascal-train.array_record*")
    whole = records.read_bytes()
    for broken in (whole[: len(whole) // 2], b""):
        records.write_bytes(broken)
        with pytest.raises(UserError, match="is damaged.*; delete that folder"):
            open_source(c, "train")


def test_a_disk_without_room(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GROWTH", 1e12)
    with pytest.raises(UserError, match="Cannot convert PASCAL-Context into .*only .* MB are free"):
        open_source(config("pascal", place), "train")
    (place.parent / "file").write_text("")
    c = replace(config("pascal", place), data_dir=str(place.parent / "file"))
    with pytest.raises(UserError, match="MOEZOO_DATA"):
        open_source(c, "train")


def test_an_interrupted_conversion_leaves_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, seen = builder.record, []

    def stop(layout, root, name):
        seen.append(name)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return read(layout, root, name)

    monkeypatch.setattr(builder, "record", stop)
    with pytest.raises(KeyboardInterrupt):
        open_source(config("pascal", place), "train")
    assert not left(place) and not list((place.parent / "data").rglob("incomplete*"))


@pytest.mark.slow
def test_two_processes_at_once(place: Path) -> None:
    code = (
        "from moezoo.domains.images.domain import DataConfig, open_source\n"
        f"source = open_source({config('pascal', place)!r}, 'train')\n"
        "print(sum(int(source[i]['image'].sum()) for i in range(len(source))))"
    )
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE) for _ in range(2)]
    told = [int(process.communicate(timeout=120)[0]) for process in both]
    source = open_source(config("pascal", place), "train")
    total = sum(int(source[i]["image"].sum()) for i in range(len(source)))
    assert told == [total, total]
    assert len(list((place.parent / "data").rglob("pascal-train.array_record*"))) == 1


def test_lists_that_an_editor_saved(place: Path, tmp_path: Path) -> None:
    """A byte order mark and line ends of Windows belong to no id."""
    plain = archive.read_ids(pascal.LAYOUT, place / "PASCALContext")
    for name in pascal.LAYOUT.lists.values():
        path = place / "PASCALContext" / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert archive.read_ids(pascal.LAYOUT, place / "PASCALContext") == plain
    path.unlink()
    os.mkfifo(path)
    with fuzz.limit(5), pytest.raises(UserError, match="is a named pipe, not a regular file"):
        archive.read_ids(pascal.LAYOUT, place / "PASCALContext")
