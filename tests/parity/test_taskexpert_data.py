"""Loaders and augmentations of the dense benchmarks against TaskPrompter's, number by number."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from moezoo.data.source import NO_REGION, SourceExample
from moezoo.domains.images.data import colour, geometry, padding, resample, transforms
from moezoo.domains.images.data.batches import collate, evaluation
from moezoo.domains.images.data.dense import nyud, pascal
from moezoo.domains.images.data.dense.layout import ArchiveLayout
from moezoo.domains.images.data.dense.pascal import WITH_NORMALS
from moezoo.domains.images.data.dense.reader import describe
from moezoo.domains.images.data.rooms.reader import KINDS
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.domains.images.tasks.edge import BoundaryF
from moezoo.domains.images.tasks.edges import boundaries, odsf
from tests.fixtures import folder, load, under

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OURS = {"human_parts": "parts", "sal": "saliency"}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}
BYTES = ("semseg", "parts", "edge", "saliency")
LAYOUTS = {"nyud": nyud.LAYOUT, "pascal": pascal.LAYOUT}
SPLITS = {"train": "train", "val": "test"}


def plain(array: np.ndarray) -> np.ndarray:
    """Without the channel axis of label maps."""
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array


def ours(arrays: dict[str, np.ndarray], prefix: str) -> SourceExample:
    """A stored sample as an example: its names and types; only images may keep fractions."""
    example = {OURS.get(k, k): plain(v) for k, v in under(arrays, prefix).items()}
    for name in BYTES:
        if name in example:
            example[name] = example[name].astype(np.uint8)
    return example


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    return load("taskexpert", "transforms")


@pytest.fixture(scope="module")
def before(arrays: dict[str, np.ndarray]) -> SourceExample:
    return ours(arrays, "in/")


def groups(arrays: dict[str, np.ndarray], start: str) -> list[str]:
    found = sorted({k.split("/")[0] for k in arrays if k.startswith(start)})
    assert found
    return found


def same(found: SourceExample, wanted: SourceExample) -> None:
    assert wanted and wanted.keys() <= found.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape, name
        np.testing.assert_allclose(found[name], value, **CLOSE, err_msg=name)


def test_random_scaling(arrays: dict[str, np.ndarray], before: SourceExample) -> None:
    for group in groups(arrays, "scale_"):
        wanted = ours(arrays, f"{group}/")
        found = geometry.scaled(before, float(group.removeprefix("scale_")), KINDS)
        image = wanted.pop("image")
        same(found, wanted)
        np.testing.assert_allclose(
            resample.linear(before["image"], image.shape[:2]), image, **CLOSE
        )
        assert np.abs(found["image"] - image).max() <= 0.5 + 1e-3  # ours is rounded to 8 bits


def test_random_crop(arrays: dict[str, np.ndarray], before: SourceExample) -> None:
    for group in groups(arrays, "crop_"):
        top, bottom, left, right = map(int, group.split("_")[1:])
        box = (slice(top, bottom), slice(left, right))
        same(geometry.window(before, box, KINDS), ours(arrays, f"{group}/"))


def test_flip(arrays: dict[str, np.ndarray], before: SourceExample) -> None:
    same(transforms.mirror(before, KINDS), ours(arrays, "flip/"))


def test_normalize(arrays: dict[str, np.ndarray], before: SourceExample) -> None:
    found = transforms.normalise(before["image"].astype(np.uint8))
    np.testing.assert_allclose(found, arrays["normalize/image"], **CLOSE)


def test_padding_and_ignore_regions(arrays: dict[str, np.ndarray], before: SourceExample) -> None:
    for group in groups(arrays, "pad_"):
        if group == "pad_ignore":
            continue
        size = tuple(map(int, group.split("_")[1:]))
        whole = (size[0], size[1])
        padded = {
            k: padding.pad_label(KINDS[k], v, whole) if k in KINDS else padding.pad(v, whole, 0)
            for k, v in before.items()
        }
        same(padded, ours(arrays, f"{group}/"))
        same(padding.reference_marks(padded), ours(arrays, "pad_ignore/"))


def test_nobody_in_the_picture(arrays: dict[str, np.ndarray]) -> None:
    found = padding.without_foreground(plain(arrays["no_person/in"]).astype(np.uint8))
    np.testing.assert_array_equal(found, plain(arrays["no_person/out"]))


def test_photometric_distortion(arrays: dict[str, np.ndarray], before: SourceExample) -> None:
    image = before["image"].astype(np.uint8)
    changes = {
        "brightness_beta": lambda x: colour.linear(image, shift=x),
        "contrast_alpha": lambda x: colour.linear(image, factor=x),
        "saturation_alpha": lambda x: colour.recoloured(image, saturation=x),
        "hue_shift": lambda x: colour.recoloured(image, hue=int(x)),
    }
    cases = under(arrays, "photo/")
    planes = np.stack(colour.to_hsv(image), -1).astype(int)
    assert np.abs(planes - cases.pop("hsv")).max() <= 1
    assert {case.rsplit("_", 1)[0] for case in cases} == changes.keys()
    for case, wanted in cases.items():
        name, amount = case.rsplit("_", 1)
        found = changes[name](float(amount))
        off = np.abs(found.astype(int) - wanted)
        assert off.max() <= 1 and (off > 0).mean() < 0.05, case
        assert np.abs(image.astype(int) - wanted).max() > 5, case


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    return load("taskexpert", "tiny_datasets_expected")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    archive = folder("taskexpert") / "tiny_datasets.zip"
    if not archive.is_file():
        pytest.skip(f"fixture file {archive} is absent")
    where = tmp_path_factory.mktemp("archives")
    with zipfile.ZipFile(archive) as file:
        file.extractall(where)
    return where


def ids(layout: ArchiveLayout, root: Path, split: str) -> list[str]:
    return (root / layout.folder / layout.lists[split]).read_text().split()


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_files_on_disk(name: str, root: Path, expected: dict[str, np.ndarray]) -> None:
    layout, seen = LAYOUTS[name], 0
    for theirs, split in SPLITS.items():
        for example_id in ids(layout, root, split):
            wanted = ours(expected, f"{name}/{theirs}/{example_id}/")
            assert {"image", *layout.tasks, "img_size"} == wanted.keys()
            found = layout.read(root / layout.folder, example_id)
            assert found["image"].shape[:2] == tuple(wanted.pop("img_size"))
            image = wanted.pop("image").astype(int)
            off = np.abs(found["image"] - image)
            assert off.max() <= (1 if layout.kinds["image"].suffix == ".jpg" else 0)
            same(found, wanted)
            assert all(found[k].dtype == np.uint8 for k in (*BYTES, "image") if k in found)
            seen += 1
    assert seen == len({k.split("/")[2] for k in expected if k.count("/") == 3 and name in k})


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_who_is_in_the_picture(split: str, root: Path, expected: dict[str, np.ndarray]) -> None:
    """The classes of objects that other loaders write into the archive."""
    wanted = json.loads(str(expected[f"pascal/{split}/parts_json"]))
    place = root / pascal.LAYOUT.folder
    names = ids(pascal.LAYOUT, root, SPLITS[split])
    found = {n: pascal.kinds(pascal.KINDS["parts"].path(place, n)) for n in names}
    assert found == wanted


def test_regions_with_normals(expected: dict[str, np.ndarray]) -> None:
    assert sorted(WITH_NORMALS) == sorted(expected["pascal/normals_valid_classes"].tolist())


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_evaluation_pipeline(name: str, root: Path, expected: dict[str, np.ndarray]) -> None:
    """A padded batch, and the reference's marks for what this project keeps as 0."""
    [prefix] = {k.split("/")[0] for k in expected if re.match(f"{name}_valpipe_pad_", k)}
    size = tuple(map(int, prefix.split("_")[-2:]))
    layout = LAYOUTS[name]
    first = layout.read(root / layout.folder, ids(layout, root, "test")[0])
    info = describe(layout, "test", (size[0], size[1]))
    batch = collate([first, first], layout.tasks, info)
    found = padding.reference_marks({k: v[1] for k, v in batch.items()})
    for ours_name in ("image", *layout.tasks):
        wanted = expected[f"{prefix}/{THEIRS.get(ours_name, ours_name)}"]
        wanted = plain(np.moveaxis(wanted, 0, -1))
        level = 1 / 255 / 0.224 if layout.kinds["image"].suffix == ".jpg" else 0.0
        more = level if ours_name == "image" else 0.0
        np.testing.assert_allclose(found[ours_name], wanted, rtol=1e-4, atol=1e-5 + more)
    assert {k.split("/")[1] for k in expected if k.startswith(prefix)} == {
        THEIRS.get(k, k) for k in ("image", *layout.tasks)
    }
    assert set(layout.tasks) <= set(KINDS)


def test_boundaries_are_those_of_the_region_maps(root: Path, tmp_path: Path) -> None:
    """From the archive through conversion and padding to the benchmark's truth."""
    place = root / pascal.LAYOUT.folder
    stored = [
        scipy.io.loadmat(pascal.KINDS["regions"].path(place, name))["LabelMap"]
        for name in ids(pascal.LAYOUT, root, "test")
    ]
    size = tuple(8 + max(side) for side in zip(*(map_.shape for map_ in stored), strict=True))
    config = DataConfig(
        name="pascal", resolution=(size[0], size[1]), archive=str(place), data_dir=str(tmp_path)
    )
    [batch] = evaluation(open_source(config, "test"), len(stored), ("regions",))
    metric = BoundaryF(odsf.PROTOCOLS["pascal_regions"])
    for one, regions in zip(batch["regions"], stored, strict=True):
        np.testing.assert_array_equal(one[one != NO_REGION].reshape(regions.shape), regions)
        truth = boundaries.from_regions(regions)
        assert truth.any()
        certain = np.full((1, *size), 255, np.uint8)
        assert (metric.count_bytes(certain, one[None])["actual"] == truth.sum()).all()
