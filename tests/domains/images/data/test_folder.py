"""Folders of one's own: what is read, how it is split, and a sentence for every wrong file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moezoo.cli import check as check_command
from moezoo.data.source import Source
from moezoo.domains.images.data.folder import labels as read_label
from moezoo.domains.images.data.folder import own as own_data
from moezoo.domains.images.data.folder import reader, survey
from moezoo.domains.images.domain import DataConfig, Images, check, form_of, open_source
from moezoo.domains.images.tasks import TASKS
from moezoo.errors import UserError
from moezoo.label import value
from moezoo.tasks.base import Task
from moezoo.tasks.registry import TaskKind
from moezoo.train import setup
from tests.domains.images.data import folders
from tests.train import tiny

TASKS_HERE = ("semseg", "normals", "edge", "depth", "scene")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right folder, to be read only."""
    return folders.make(tmp_path_factory.mktemp("own") / "plots")


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made, tmp_path / "plots"))


def config(root: Path, size: tuple[int, int] = folders.SIZE) -> DataConfig:
    return DataConfig(name="folder", archive=str(root), resolution=size, augment=())


def opened(root: Path, size: tuple[int, int] = folders.SIZE) -> dict[str, Source]:
    return {split: open_source(config(root, size), split) for split in ("train", "test")}


def names(root: Path) -> dict[str, tuple[str, ...]]:
    return dict(reader.look(root).splits)


def everything(root: Path) -> dict[str, dict[str, np.ndarray]]:
    """All examples by name at the images' size."""
    found = reader.look(root)
    return {name: found.example(name, folders.SIZE) for name in found.names}


def test_examples_are_the_files_pixel_by_pixel(made: Path) -> None:
    for split, source in opened(made).items():
        assert source.info.tasks == TASKS_HERE and source.info.split == split
        for index, name in enumerate(names(made)[split]):
            wanted, found = folders.scene(int(name[4:])), source[index]
            assert found.keys() == {"image", *TASKS_HERE}
            np.testing.assert_array_equal(found["image"], wanted["images"])
            np.testing.assert_array_equal(found["semseg"], wanted["semseg"])
            np.testing.assert_array_equal(found["edge"], wanted["edge"])
            np.testing.assert_array_equal(found["depth"], np.float32(wanted["depth"] / 1000))
            np.testing.assert_allclose(found["normals"], wanted["normals"], atol=1e-6)
            word = source.info.labels["scene"].names[int(found["scene"])]
            assert word == ("dry" if int(name[4:]) % 3 else "wet")
            for task in TASKS_HERE:
                kind = source.info.kinds[task]
                assert (found[task].dtype, found[task].shape) == (
                    kind.type,
                    kind.shape(folders.SIZE),
                )
    with pytest.raises(IndexError):
        opened(made)["test"][100]


def test_the_form_of_a_batch_and_the_classes_need_no_pixels(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_label, "image", None)
    monkeypatch.setattr(read_label.MapReader, "__call__", None)
    given = config(made, (24, 32))
    blank = form_of(given)
    assert blank[0]["semseg"].shape == (24, 32) and blank.info.tasks == TASKS_HERE
    run = tiny.config("runs", tasks=("semseg", "depth"), data=given)
    batch, classes = Images(given).example(run)
    assert batch["image"].shape == (1, 24, 32, 3)
    assert classes.names["semseg"] == folders.NAMES and classes.counts["scene"] == 2


def test_what_is_decoded_stays_in_memory_and_cannot_be_spoilt(made: Path) -> None:
    source = open_source(config(made), "train")
    first = source[0]
    first["semseg"] = np.zeros(1)
    assert source[0]["image"] is first["image"] and source[0]["semseg"].shape == folders.SIZE
    lazy = reader.open_folder(made, "train", folders.SIZE)
    assert lazy[0]["image"] is not lazy[0]["image"]


def test_masks_as_indices_arrays_and_palettes_are_the_same(made: Path, own: Path) -> None:
    for index, path in enumerate(sorted((own / "semseg").glob("*.png"))):
        values = np.array(Image.open(path, formats=["PNG"]))
        if index % 2:
            image = Image.fromarray(values, "P")
            image.putpalette([7, 7, 7, 250, 0, 0, 9, 9, 200] + 253 * [1, 2, 3])
            image.save(path)
        else:
            np.save(path.with_suffix(".npy"), np.where(values == 255, -1, values.astype(np.int16)))
            path.unlink()
    folders.say(own, unlabelled={"semseg": -1})
    for name, example in everything(own).items():
        np.testing.assert_array_equal(example["semseg"], everything(made)[name]["semseg"])


def test_depth_in_millimetres_equals_metres(made: Path, own: Path) -> None:
    before = everything(made)
    for path in (own / "depth").glob("*.png"):
        folders.save(path.with_suffix(".npy"), before[path.stem]["depth"])
        path.unlink()
    folders.say(own, depth=None)
    for name, example in everything(own).items():
        np.testing.assert_array_equal(example["depth"], before[name]["depth"])
    for unit, factor in (("cm", 100), (0.5, 2)):
        folders.say(own, depth={"unit": unit})
        for path in (own / "depth").glob("*.npy"):
            np.save(path, before[path.stem]["depth"].astype(np.float64) * factor)
        for name, example in everything(own).items():
            np.testing.assert_allclose(example["depth"], before[name]["depth"], rtol=1e-6)


def test_normals_of_pictures_are_unit_vectors_or_unknown(made: Path, own: Path) -> None:
    for path in (own / "normals").glob("*.npy"):
        values = np.rint((np.load(path) + 1) / 2 * 255).astype(np.uint8)
        values[0, 0], values[0, 1], values[0, 2] = 0, 128, 127
        folders.save(path.with_suffix(".png"), values)
        path.unlink()
    for name, example in everything(own).items():
        assert not example["normals"][0, :3].any()
        lengths = np.linalg.norm(example["normals"], axis=-1)
        np.testing.assert_allclose(lengths[1:], 1, atol=1e-6)
        wanted = everything(made)[name]["normals"]
        np.testing.assert_allclose(example["normals"][1:], wanted[1:], atol=0.01)


def test_other_sizes_are_resized_as_predictions_are(made: Path) -> None:
    half, twice = (6, 8), (24, 32)
    small, large = (reader.open_folder(made, "train", size)[0] for size in (half, twice))
    same = opened(made)["train"][0]
    np.testing.assert_array_equal(large["semseg"], same["semseg"].repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(small["depth"], same["depth"][::2, ::2])
    image = Image.fromarray(same["image"]).resize(half[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(small["image"], np.asarray(image))


def test_no_line_gets_lost_where_edges_are_shrunk(own: Path) -> None:
    for path in (own / "edge").glob("*.png"):
        values = np.zeros(folders.SIZE, np.uint8)
        values[:, 5] = 1  # at no nearest pixel
        folders.save(path, values)
    found = reader.open_folder(own, "train", (4, 4))[0]["edge"]
    wanted = np.zeros((4, 4), np.uint8)
    wanted[:, 1] = 1
    np.testing.assert_array_equal(found, wanted)


def test_classes_without_names_are_counted(own: Path) -> None:
    folders.say(own, classes=None, colours={"semseg": [[1, 2, 3]]})
    labels = reader.look(own).labels["semseg"]
    assert labels.names == ("class 0", "class 1", "class 2")
    assert labels.palette[0].tolist() == [1, 2, 3] and labels.palette.shape == (3, 3)
    mask = np.full(folders.SIZE, 4, np.uint8)
    folders.save(own / "semseg/plot3.png", mask)  # a file that changes is read again
    assert reader.look(own).labels["semseg"].classes == 5


def test_binary_maps_may_have_a_number_without_label(own: Path) -> None:
    values = np.zeros(folders.SIZE, np.uint8)
    values[0], values[1] = 1, 255
    for index in range(8):
        folders.save(own / f"edge/plot{index}.png", values)
    with pytest.raises(UserError, match=r"plot\d.png' has the numbers 0, 1, 255, but edge"):
        opened(own)
    folders.say(own, unlabelled={"edge": 255})
    np.testing.assert_array_equal(opened(own)["train"][0]["edge"], values)


def test_a_task_of_ones_own_has_a_folder_too(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def height(weight: float = 1.0) -> Task:
        return replace(own_data.make_task("depth", None), name="height", label=value(-1))

    monkeypatch.setitem(TASKS.data, "height", TaskKind(height))
    given = np.arange(12 * 16, dtype=np.float32).reshape(folders.SIZE) - 1
    for index in range(8):
        folders.save(own / f"height/plot{index}.npy", given)
    source = opened(own)["train"]
    assert source.info.tasks == (*TASKS_HERE, "height")
    np.testing.assert_array_equal(source[0]["height"], given)


def test_a_split_stays_when_images_are_added(own: Path) -> None:
    before = names(own)
    assert len(before["train"]) + len(before["test"]) == 8 and before["test"]
    for index in range(8, 40):
        folders.write(own, index)
    (own / "scene.csv").unlink()
    after = names(own)
    assert all(set(before[split]) <= set(after[split]) for split in before)
    assert 2 <= len(after["test"]) <= 14
    folders.say(own, test_share=0.5)
    assert set(after["test"]) < set(names(own)["test"])


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_both_splits_have_an_image(own: Path, share: float) -> None:
    folders.say(own, test_share=share)
    assert sorted(map(len, names(own).values())) == [1, 7]


def test_splits_by_lists(own: Path) -> None:
    folders.say(own, test=["plot1", "plot3.png"])
    assert names(own)["test"] == ("plot1", "plot3") and len(names(own)["train"]) == 6
    folders.say(own)
    (own / "test.txt").write_text("plot2\n\nplot0.png\n")
    assert names(own)["test"] == ("plot0", "plot2") and len(names(own)["train"]) == 6
    (own / "train.txt").write_text("plot5\n")
    assert names(own) == {"train": ("plot5",), "test": ("plot0", "plot2")}


def test_nothing_is_written_and_foreign_files_are_left_alone(own: Path) -> None:
    (own / "_raw").mkdir()
    (own / ".git").mkdir()
    for name in ("README.txt", "images/.DS_Store", "semseg/Thumbs.db", "images/_left_out.txt"):
        (own / name).write_text("something else")
    before = sorted(own.rglob("*"))
    assert len(opened(own)["train"]) + len(opened(own)["test"]) == 8
    assert sorted(own.rglob("*")) == before


def _replaced(name: str, values: np.ndarray) -> Callable[[Path], None]:
    return lambda root: folders.save(root / name, values)


def _text(name: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(text) and None


def _depth(values: np.ndarray, **said: object) -> Callable[[Path], None]:
    """One depth map as an array in place of the picture."""

    def change(root: Path) -> None:
        for path in (root / "depth").glob(
            "*.png" if said.get("depth", MM) is None else "plot2.png"
        ):
            folders.save(path.with_suffix(".npy"), FLAT)
            path.unlink()
        folders.save(root / "depth/plot2.npy", values)
        folders.say(root, **said)

    return change


def _pipe(root: Path) -> None:
    (root / "depth/plot2.png").unlink()
    os.mkfifo(root / "depth/plot2.png")


def _cut(root: Path) -> None:
    whole = (root / "semseg/plot2.png").read_bytes()
    (root / "semseg/plot2.png").write_bytes(whole[: len(whole) // 2])


def _fewer(root: Path) -> None:
    for index in (2, 3, 4):
        (root / f"semseg/plot{index}.png").unlink()


def _one(root: Path) -> None:
    for path in (root / "images").iterdir():
        if path.stem != "plot2":
            path.unlink()


def _jpeg(root: Path) -> None:
    Image.fromarray(folders.scene(2)["semseg"]).save(root / "semseg/plot2.png", "JPEG")


def _twice(root: Path) -> None:
    folders.save(root / "images/plot2.bmp", folders.scene(2)["images"])


def _emptied(root: Path) -> None:
    for path in (root / "edge").iterdir():
        path.unlink()


MM, FLAT = {"unit": "mm"}, np.ones(folders.SIZE, np.float32)
TALL = np.zeros((16, 12), np.uint8)
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "size": (_replaced("semseg/plot2.png", TALL[:9]), r"plot2.png' has 9 x 12 pixels, but its im"),
    "turned": (_replaced("semseg/plot2.png", TALL), r"16 x 12 pixels, .* 12 x 16 \(.* EXIF\)"),
    "no label": (
        _fewer,
        r"plot2.png' has no label in '.*semseg', nor have 2 more: add 'plot2.png'",
    ),
    "no label, in two folders": (
        lambda root: [(root / f"{task}/plot2.png").unlink() for task in ("semseg", "edge")],
        r"plot2.png' has no label in '.*: add 'plot2.png', .* has no label in '.*: add 'plot2.png'",
    ),
    "no image": (
        _replaced("semseg/plot20.png", TALL),
        r"semseg/plot20.png' is the label of no image \(there is 'plot\d.png'\)",
    ),
    "class": (
        _replaced("semseg/plot2.png", TALL.T + 3),
        r"plot2.png' has the class 3 at row 0, col",
    ),
    "negative": (
        lambda root: (
            (root / "semseg/plot2.png").unlink(),
            folders.save(root / "semseg/plot2.npy", TALL.T.astype(np.int8) - 2),
        ),
        r"plot2.npy' has the class -2 at row 0",
    ),
    "colours": (
        _replaced("semseg/plot2.png", np.zeros((12, 16, 3), np.uint8)),
        r"plot2.png' has 3 ch",
    ),
    "JPEG": (_jpeg, r"plot2.png' is a JPEG"),
    "lossy": (
        _replaced("semseg/plot2.jpg", TALL),
        r"plot2.jpg' is none of .* \(others change numb",
    ),
    "grey edges": (
        _replaced("edge/plot2.png", TALL.T + 7),
        r"plot2.png' has the numbers 7, but edge",
    ),
    "millimetres": (
        _depth(1000 * FLAT, depth=None),
        r"plot2.npy' has depths of 1,000 m in the middle",
    ),
    "metres": (_depth(FLAT, depth=MM), r"plot2.npy' has no depth above 0.001 m, below 0.05 m"),
    "no unit": (
        lambda root: folders.say(root, depth=None),
        r"png' has depth in whole numbers of a unit",
    ),
    "NaN": (_depth(FLAT * np.nan), r"plot2.npy' has numbers that are not finite"),
    "below 0": (_depth(-FLAT), r"plot2.npy' has negative depths"),
    "8 bits": (_replaced("depth/plot2.png", TALL.T + 9), r"depth/plot2.png' has 8 bits, too few"),
    "words": (
        _depth(np.full(folders.SIZE, "a")),
        r"plot2.npy' has values of the type <U1: save numbers",
    ),
    "long vectors": (
        _replaced("normals/plot2.npy", np.full((12, 16, 3), 7, np.float32)),
        r"plot2.npy' has vectors of length 12.1 in the middle",
    ),
    "grey normals": (
        lambda root: (
            (root / "normals/plot2.npy").unlink(),
            folders.save(root / "normals/plot2.png", TALL.T),
        ),
        r"plot2.png' is not a picture of three plain channels",
    ),
    "shape": (
        _replaced("normals/plot2.npy", FLAT),
        r"has the shape \(12, 16\), not \[height, width, 3",
    ),
    "no array": (
        _text("normals/plot2.npy", "words"),
        r"plot2.npy' cannot be read as a NumPy array",
    ),
    "cut": (_cut, r"semseg/plot2.png' is damaged or not a picture"),
    "text": (_text("images/plot2.png", "words"), r"images/plot2.png' is not a picture in one of"),
    "pipe": (_pipe, r"depth/plot2.png' is a named pipe, not a regular file"),
    "nested": (
        lambda root: (root / "images/more").mkdir(),
        r"images/more' is a folder, not a file",
    ),
    "twice": (_twice, r"plot2.bmp' and 'plot2.png' have one name"),
    "unknown task": (lambda root: (root / "semsge").mkdir(), r"semsge' is .*did you mean semseg"),
    "far from any": (
        lambda root: (root / "xyz").mkdir(),
        r"xyz' is called as no task is .*tasks: sem",
    ),
    "file for a folder": (_text("parts", "words"), r"parts' is a file: put the labels of parts"),
    "scene folder": (
        lambda root: (root / "scene").mkdir(),
        r"scene' is a folder, but scene is one cl",
    ),
    "table of a map": (_text("depth.csv", "a,b"), r"depth.csv' is a table, but depth is a map"),
    "empty": (_emptied, r"The folder '.*edge' is empty"),
    "one image": (_one, r"images' has one image: put at least two"),
    "no images": (lambda root: shutil.rmtree(root / "images"), r"plots' has no folder 'images'"),
    "no folder": (shutil.rmtree, r"The folder '.*plots' is missing"),
    "line": (
        _text("scene.csv", "plot1,a,b"),
        r"scene.csv' has the line 1 'plot1,a,b', which is not",
    ),
    "no such": (
        _text("scene.csv", "plat1,a"),
        r"scene.csv', line 1, names the image 'plat1'.*plot1",
    ),
    "no line": (
        _text("scene.csv", "plot1,a\nplot0,b"),
        r"plot2.png' has no line in .*, nor have 5 mo",
    ),
    "two classes": (
        _text("scene.csv", "plot1,a\nplot1,b"),
        r"has two classes for the image 'plot1'",
    ),
    "not UTF-8": (
        lambda root: (root / "test.txt").write_bytes(b"\xff\xff"),
        r"test.txt' is not text",
    ),
    "list": (
        _text("test.txt", "plot77"),
        r"test.txt' names the image 'plot77', which is not there",
    ),
    "no JSON": (_text("folder.json", "{"), r"folder.json' is not as it should be, it is not JSON"),
    "key": (
        lambda root: folders.say(root, clases={}),
        r"Unknown name in .*json' 'clases': .*classes",
    ),
    "unit": (
        lambda root: folders.say(root, depth={"unit": "feet"}),
        r"depth.unit is 'feet', it must",
    ),
    "depth key": (lambda root: folders.say(root, depth={"units": 1}), r"depth.units is not known"),
    "range": (lambda root: folders.say(root, depth={"range": [2, 1]}), r"depth.range 2 to 1"),
    "no such task": (
        lambda root: folders.say(root, classes={"parts": ["a", "b"]}),
        r"Unknown task in classes of '.*folder.json' 'parts': known: scene, semseg",
    ),
    "one class": (
        lambda root: folders.say(root, classes={"semseg": ["a"]}),
        r"semseg' has 1 class, ",
    ),
    "same class": (
        lambda root: folders.say(root, classes={"semseg": ["a", "b", "a"]}),
        r"has the class 'a' of semseg twice",
    ),
    "word": (
        lambda root: folders.say(root, classes={"scene": ["dry", "wett"]}),
        r"'wet': did you mean",
    ),
    "colours of too many": (
        lambda root: folders.say(root, colours={"semseg": [[0, 0, 0]] * 2}),
        r"has 3 classes of semseg, but 2 colours",
    ),
    "two ways": (
        lambda root: folders.say(root, test=["plot1"], test_share=0.1),
        r"both test and test_",
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_every_wrong_file_is_one_sentence_of_training_and_of_the_check(
    fault: str, own: Path, tmp_path: Path
) -> None:
    change, says = WRONG[fault]
    change(own)
    with pytest.raises(UserError, match=says) as error:
        for source in opened(own).values():
            for index in range(len(source)):
                source[index]
    assert "\n" not in str(error.value) and str(error.value)[-1] in ".?", error.value
    with pytest.raises(UserError) as again:
        check_command.main([str(own), "--out", str(tmp_path / "sheet.png")], "moezoo check")
    assert fault in ("no unit",) or str(again.value) == str(error.value)
    assert not (tmp_path / "sheet.png").exists()


def test_train_and_test_lists_must_differ(own: Path) -> None:
    (own / "test.txt").write_text("plot1")
    (own / "train.txt").write_text("plot1\nplot2")
    with pytest.raises(UserError, match=r"has 'plot1' in train.txt and in test.txt"):
        opened(own)
    (own / "train.txt").write_text("\n")
    with pytest.raises(UserError, match="has no train images"):
        opened(own)
    folders.say(own, test=["plot3"])
    with pytest.raises(UserError, match="lists its images in folder.json and in"):
        opened(own)


def test_tasks_without_labels_are_told_before_they_are_made(own: Path) -> None:
    shutil.rmtree(own / "semseg")
    folders.say(own, classes=None)
    run = tiny.config("runs", tasks=("semseg", "depth"), data=config(own))
    with pytest.raises(UserError, match="no labels for task semseg: take --tasks from normals, e"):
        setup.prepare(run)


def test_the_data_section_names_the_folder() -> None:
    with pytest.raises(UserError, match="give --data.archive DIR"):
        check(DataConfig(name="folder"))
    check(DataConfig(name="folder", archive="anywhere"))


def test_the_check_counts_and_draws(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    folders.save(own / "edge/plot2.png", np.zeros(folders.SIZE, np.uint8))
    folders.say(own, classes={"semseg": [*folders.NAMES, "stone"]})
    out = tmp_path / "sheet.png"
    check_command.main([str(own), "--out", str(out), "--count", "3"], "moezoo check")
    said = capsys.readouterr().out
    assert "8 images, " in said and "12 x 16 (8)" in said and "metres" in said
    assert "4 classes, 1.6 % without label" in said and "crop" in said
    assert "No train image has the semseg class 3 (stone)." in said
    assert "by up to 33 %" in said and "--tasks semseg normals edge depth" in said
    with Image.open(out, formats=["PNG"]) as sheet:
        assert sheet.width > 6 * 100
    found = survey.survey(own)
    depths = np.stack([folders.scene(i)["depth"] for i in range(8)]) / 1000
    depth = found.counts["depth"]
    np.testing.assert_allclose((depth.low, depth.high), (depths.min(), depths.max()), rtol=1e-6)
    masks = np.stack([folders.scene(i)["semseg"] for i in range(8)])
    wanted = np.bincount(masks[masks < 255], minlength=4)
    np.testing.assert_array_equal(sum(found.counts["semseg"].classes.values()), wanted)


def test_the_check_names_every_wrong_file(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _cut(own)
    _depth(FLAT * np.nan)(own)
    with pytest.raises(UserError, match=r"2 files of '.*plots' are wrong \(see above\)"):
        check_command.main([str(own), "--out", str(tmp_path / "sheet.png")], "moezoo check")
    said = capsys.readouterr().out
    assert "semseg/plot2.png" in said and "depth/plot2.npy" in said


def test_what_differs_in_names_alone_is_said_once(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image in (own / "images").iterdir():
        image.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"8 files of '.*plots' are wrong \(see above\)"):
        check_command.main([str(own), "--out", str(tmp_path / "sheet.png")], "moezoo check")
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "plot" in line]
    assert "plot0" in said and said.endswith("So it is with 7 more.")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "INSIDE"], "inside the folder to be checked"),
        (["--count", "0"], "--count is 0"),
        (["--resolution", "4", "64"], "--resolution is 4 64"),
    ],
)
def test_options_of_the_check(made: Path, words: list[str], says: str) -> None:
    words = [str(made / "sheet.png") if word == "INSIDE" else word for word in words]
    with pytest.raises(UserError, match=says):
        check_command.main([str(made), *words], "moezoo check")
