"""NYUD-v2 and PASCAL-Context from conversion to batches, on archives made here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from moezoo.data.pipeline import host_rows
from moezoo.data.source import ArraySource, First, Source
from moezoo.domains.images.data import padding, transforms
from moezoo.domains.images.data.batches import evaluation
from moezoo.domains.images.data.batches import training as Training
from moezoo.domains.images.data.dense import files, names, nyud, pascal
from moezoo.domains.images.data.preview import contact_sheet
from moezoo.domains.images.domain import DataConfig, check, form_of, open_source
from moezoo.errors import UserError
from tests.domains.images.data import archives

AUGMENT = ("scale", "crop", "flip", "distort")
LAYOUTS = {"nyud": nyud.LAYOUT, "pascal": pascal.LAYOUT}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("archives")
    archives.make_nyud(where, train=3)
    archives.make_pascal(where, train=5, test=3)
    return where


@pytest.fixture(scope="module")
def configs(place: Path) -> dict[str, DataConfig]:
    given = {"data_dir": str(place), "augment": AUGMENT}
    return {
        "nyud": DataConfig(name="nyud", resolution=(448, 576), **given),
        "pascal": DataConfig(name="pascal", resolution=(64, 80), **given),
    }


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_records_hold_what_the_files_hold(name: str, configs: dict, place: Path) -> None:
    layout = LAYOUTS[name]
    for split in ("train", "test"):
        source = open_source(configs[name], split)
        ids = (place / layout.folder / layout.lists[split]).read_text().split()
        assert isinstance(source, Source) and len(source) == len(ids)
        assert source.info.tasks == layout.tasks and source.info.split == split
        for index, example_id in enumerate(ids):
            found, wanted = source[index], layout.read(place / layout.folder, example_id)
            assert found.keys() == {"image", *layout.tasks, *layout.extras}
            kinds = {"depth": np.float32, "normals": np.float32, "regions": np.uint16}
            for key, value in found.items():
                np.testing.assert_array_equal(value, wanted[key])
                assert value.dtype == kinds.get(key, np.uint8)


def test_labels_as_this_project_marks_them(configs: dict) -> None:
    one = open_source(configs["nyud"], "test")[0]
    assert one["semseg"][0, 0] == 255 and one["semseg"][0, 1] == 39 and one["semseg"].min() == 0
    assert set(np.unique(one["edge"])) == {0, 1} and one["depth"].min() == 0
    source = open_source(configs["pascal"], "train")
    both = [source[0], source[2]]
    assert [e["parts"].any() for e in both] == [True, False]
    for example in both:
        unknown = ~example["normals"].any(-1)
        assert 0.1 < unknown.mean() < 0.9
        assert set(np.unique(example["saliency"])) == {0, 1}
        assert 0 < example["edge"].mean() < 0.3


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_batches_have_one_size(name: str, configs: dict) -> None:
    config = configs[name]
    source = open_source(config, "train")
    training = Training(source, 4, 0, augment=config.augment)
    sizes = {source[i]["image"].shape for i in range(len(source))}
    assert len(sizes) == (1 if name == "nyud" else 5)
    shares = []
    for step in range(6):
        batch = training.batch(step)
        assert batch["image"].shape == (4, *config.resolution, 3)
        for task in source.info.tasks:
            depth = (3,) if task == "normals" else ()
            assert batch[task].shape == (4, *config.resolution, *depth)
        padded = ~batch["image"].any(-1)  # the mean colour; no 8-bit level is normalised to 0
        shares.append(padded.mean())
        for task in source.info.tasks:
            unlabelled = {"depth": 0, "normals": 0}.get(task, 255)
            assert (batch[task][padded] == unlabelled).all(), task
    assert 0 < np.mean(shares) < 0.8


def test_a_batch_is_a_function_of_its_step(configs: dict) -> None:
    """Also across threads, processes and hosts."""
    source = open_source(configs["pascal"], "train")
    whole = [Training(source, 6, 3, augment=AUGMENT).batch(step) for step in range(4)]
    other = Training(open_source(configs["pascal"], "train"), 6, 3, augment=AUGMENT)
    for step in reversed(range(4)):
        shares = [other.batch(step, host_rows(6, p, 3)) for p in range(3)]
        for key, value in whole[step].items():
            np.testing.assert_array_equal(value, np.concatenate([s[key] for s in shares]))
    varied = Training(source, 6, 4, augment=AUGMENT).batch(0)
    assert not np.array_equal(varied["image"], whole[0]["image"])


def test_threads_change_nothing(configs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(configs["pascal"], "train")
    threaded = Training(source, 6, 3, augment=AUGMENT).batch(1)
    monkeypatch.setattr("moezoo.data.pipeline._each", lambda _, work: [make() for make in work])
    alone = Training(source, 6, 3, augment=AUGMENT).batch(1)
    for key, value in threaded.items():
        np.testing.assert_array_equal(value, alone[key])


def test_evaluation_pads_and_leaves_nobody_unlabelled(configs: dict) -> None:
    source = open_source(configs["pascal"], "test")
    batches = list(evaluation(First(source, 3), 2))
    assert [b["valid"].tolist() for b in batches] == [[True, True], [True, False]]
    shown = {k: np.concatenate([b[k] for b in batches])[:3] for k in batches[0]}
    size = configs["pascal"].resolution
    for index in range(3):
        example = source[index]
        for task in source.info.tasks:
            wanted = padding.pad_label(source.info.kinds[task], example[task], size)
            if task == "parts" and not example["parts"].any():
                wanted = np.full_like(wanted, 255)
            np.testing.assert_array_equal(shown[task][index], wanted)
        image = padding.pad(transforms.normalise(example["image"]), size, 0)
        np.testing.assert_array_equal(shown["image"][index], image)
    assert any((row == 255).all() for row in shown["parts"])


def test_regions_are_for_scores_alone(configs: dict) -> None:
    source = open_source(configs["pascal"], "test")
    names = ("edge", "regions")
    shown = list(evaluation(source, 2, names))
    maps = np.concatenate([batch["regions"] for batch in shown])
    assert maps.dtype == np.uint16
    for index in range(len(source)):
        found = maps[index]
        inside = found != 65535
        np.testing.assert_array_equal(
            found[inside].reshape(source[index]["image"].shape[:2]), source[index]["regions"]
        )
    assert "regions" not in next(iter(evaluation(source, 2)))
    training = open_source(configs["pascal"], "train")
    assert "regions" not in Training(training, 2, 0, augment=AUGMENT).batch(0)
    with pytest.raises(UserError, match="pascal has no labels for regions to learn"):
        Training(training, 2, 0, names)


def test_a_crop_without_parts_is_unlabelled(configs: dict) -> None:
    source = open_source(configs["pascal"], "train")
    small = replace(configs["pascal"], resolution=(8, 8))
    source = open_source(small, "train")
    rows = np.concatenate(
        [Training(source, 8, 0, augment=("crop",)).batch(k)["parts"] for k in range(4)]
    )
    assert all((row == 255).all() or ((row > 0) & (row < 255)).any() for row in rows)
    assert {bool((row == 255).all()) for row in rows} == {True, False}


def test_rooms_is_never_marked_like_that(tiny: DataConfig) -> None:
    source = open_source(tiny, "train")
    assert source.info.foreground_only == ()
    flat = First(source, 1)
    assert not (next(iter(evaluation(flat, 1)))["parts"] == 255).any()


def test_images_of_rooms_may_be_scaled_too(tiny: DataConfig) -> None:
    batch = Training(open_source(tiny, "train"), 5, 0, augment=("scale", "crop")).batch(0)
    assert batch["image"].shape == (5, 16, 24, 3) and (batch["semseg"] == 255).any()


@pytest.mark.parametrize("augment", [("scale",), ("crop", "scale")])
def test_scaled_images_need_a_window(augment: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="it needs 'crop' after it"):
        check(DataConfig(augment=augment))
    check(DataConfig(augment=("scale", "flip", "crop")))


def test_an_ordinary_tfds_builder(configs: dict, place: Path) -> None:
    open_source(configs["pascal"], "train")
    [folder] = (place / "pascal").glob("train5_test3_*/1.0.0")
    opened = tfds.builder_from_directory(str(folder))
    record = opened.as_data_source("train")[0]  # pyright: ignore
    example_id = record["id"].decode()
    regions = pascal.region_map(pascal.KINDS["regions"].path(place / "PASCALContext", example_id))
    np.testing.assert_array_equal(record["regions"], regions)
    assert opened.info.metadata is not None and opened.info.metadata["largest_train"]
    undecoded = {"image": tfds.decode.SkipDecoding()}
    stored = opened.as_data_source("train", decoders=undecoded)[0]["image"]  # pyright: ignore
    assert stored == (place / f"PASCALContext/JPEGImages/{example_id}.jpg").read_bytes()


def test_labels_of_other_sizes_are_fitted(tmp_path: Path) -> None:
    """As the reference does: class maps at the nearest pixels, normals smoothly."""
    root = archives.make_pascal(tmp_path, train=1, test=1)
    name = (root / "ImageSets/Context/train.txt").read_text().strip()
    size = files.size_of(root / f"JPEGImages/{name}.jpg")
    plain = np.full((20, 24, 3), (255, 0, 204), np.uint8)
    for path, values in (("sal_distill", plain[..., 2]), ("normals_distill", plain)):
        archives.save(root / f"{path}/{name}.png", values)
    example = pascal.read(root, name)
    assert example["saliency"].shape == size and example["saliency"].all()
    known = example["normals"].any(-1)
    wanted = np.broadcast_to(np.array([1, -1, 0.6], np.float32), (int(known.sum()), 3))
    np.testing.assert_allclose(example["normals"][known], wanted, atol=1e-5)
    config = DataConfig(name="pascal", resolution=(64, 64), data_dir=str(tmp_path))
    stored = open_source(config, "train")[0]
    np.testing.assert_allclose(stored["normals"], example["normals"], atol=1 / 255)
    np.testing.assert_array_equal(stored["saliency"], example["saliency"])


def test_grey_images_become_colour(tmp_path: Path) -> None:
    root = archives.make_pascal(tmp_path, train=1, test=1)
    name = (root / "ImageSets/Context/train.txt").read_text().strip()
    path = root / f"JPEGImages/{name}.jpg"
    Image.open(path).convert("L").save(path)
    config = DataConfig(name="pascal", resolution=(64, 64), data_dir=str(tmp_path))
    image = open_source(config, "train")[0]["image"]
    np.testing.assert_array_equal(image, files.rgb(path))
    assert (image[..., 0] == image[..., 2]).all()


def test_edges_of_a_region() -> None:
    regions = np.zeros((9, 12), np.uint16)
    regions[:, 6:] = 300
    lines = pascal.outlines(regions)
    assert lines.dtype == np.uint8 and (lines[1:].sum(1) == 1).all()
    assert set(np.nonzero(lines)[1]) <= {5, 6}
    assert not pascal.outlines(np.full((4, 4), 7, np.uint16)).any()


def test_names_and_colours() -> None:
    assert (len(names.NYUD), len(names.VOC), len(names.HUMAN_PARTS)) == (40, 21, 7)
    for given in (names.NYUD, names.VOC, names.HUMAN_PARTS):
        assert len(set(given)) == len(given)
    wanted = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    np.testing.assert_array_equal(names.VOC_PALETTE[:5], wanted)
    np.testing.assert_array_equal(names.VOC_PALETTE[[15, 20]], [[192, 128, 128], [0, 64, 128]])
    for palette in (names.NYUD_PALETTE, names.VOC_PALETTE, names.HUMAN_PART_PALETTE):
        assert len(np.unique(palette, axis=0)) == len(palette)


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_form_of_a_batch_without_any_archive(name: str, configs: dict) -> None:
    nowhere = replace(configs[name], data_dir="/nowhere")
    blank = form_of(nowhere)
    real = open_source(configs[name], "train")
    assert isinstance(blank, ArraySource) and blank.info == real.info
    one, other = (Training(source, 2, 0, augment=AUGMENT).batch(0) for source in (blank, real))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
        k: (v.shape, v.dtype) for k, v in other.items()
    }
    assert not blank[0]["normals"].any() and (blank[0]["semseg"] == 255).all()


def test_a_contact_sheet_of_images_of_several_sizes(configs: dict) -> None:
    source = open_source(configs["pascal"], "test")
    assert contact_sheet(source, range(3)).shape == (3 * 64, 6 * 80, 3)
