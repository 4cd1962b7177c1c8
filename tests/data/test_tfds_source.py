"""Mapped tfds data sets: values by hand, preparation from archives, and everything wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.download import checksums

from moezoo.data import oxford_pets, oxford_pets_builder, resample, tfds_store
from moezoo.data import tfds_source as mapped
from moezoo.data.config import MAPPED, DataConfig, form_of, open_source
from moezoo.data.dense.builder import png
from moezoo.data.pipeline import Training, evaluation
from moezoo.data.source import Arrays, Labels, Source
from moezoo.data.tfds_source import Mapped, TfdsMapping, convert
from moezoo.errors import UserError
from tests.data import pets

PETS = "oxford_iiit_pet"
SIZE = (24, 40)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = pets.make_pets(tmp_path_factory.mktemp("pets"))
    pets.disguise(where / "images/beagle_2.jpg")
    return where


@pytest.fixture(scope="module")
def config(place: Path) -> DataConfig:
    return DataConfig(
        name=PETS, resolution=SIZE, archive=str(place), data_dir=str(place / "data"), augment=()
    )


def record(trimap: Any, **more: Any) -> dict[str, Any]:
    mask = np.asarray(trimap, np.uint8)[..., None]
    image = np.zeros((*mask.shape[:2], 3), np.uint8)
    return {"image": image, "segmentation_mask": mask, "label": 4, "species": 1, **more}


TRIMAP = [
    [2, 2, 2, 2, 2, 2],
    [2, 3, 3, 3, 3, 2],
    [2, 3, 1, 1, 3, 2],
    [2, 3, 1, 1, 3, 2],
    [2, 3, 3, 3, 3, 2],
    [2, 2, 2, 2, 2, 2],
]


def test_labels_of_a_trimap_by_hand() -> None:
    example = convert(MAPPED[PETS], record(TRIMAP), (6, 6))
    np.testing.assert_array_equal(example["semseg"], np.array(TRIMAP) - 1)
    row = [0, 255, 1, 1, 255, 0]
    np.testing.assert_array_equal(example["saliency"][2], row)
    np.testing.assert_array_equal(example["saliency"][1], [0, 255, 255, 255, 255, 0])
    np.testing.assert_array_equal(example["edge"][2], [0, 1, 0, 0, 1, 0])
    assert not example["edge"][[0, 5]].any() and not example["edge"][2:4, 2:4].any()
    assert example["scene"] == 4 and {v.dtype for v in example.values()} == {np.dtype(np.uint8)}
    assert convert(MAPPED["oxford_iiit_pet_species"], record(TRIMAP), (6, 6))["scene"] == 1


def test_a_wide_border_becomes_a_thin_line() -> None:
    wide = np.full((9, 12), 2)
    wide[:, 6:] = 1
    wide[:, 4:7] = 3
    lines = oxford_pets.outline(record(wide))
    assert (lines[1:-1].sum(1) == 1).all() and set(np.nonzero(lines[1:-1])[1]) == {5}


def test_without_a_border_the_line_is_where_both_touch() -> None:
    halves = np.full((9, 12), 2)
    halves[:, 6:] = 1
    lines = oxford_pets.outline(record(halves))
    assert (lines.sum(1) == 1).all() and set(np.nonzero(lines)[1]) == {6}
    assert not oxford_pets.outline(record(np.full((4, 4), 1))).any()


def test_pictures_are_resized_before_labels_are_made() -> None:
    rng = np.random.default_rng(0)
    given = record(rng.integers(1, 4, (7, 5)), image=rng.integers(0, 256, (9, 4, 3), np.uint8))
    example = convert(MAPPED[PETS], given, SIZE)
    wanted = resample.nearest(given["segmentation_mask"], SIZE)
    np.testing.assert_array_equal(example["semseg"], wanted[..., 0] - 1)
    edges = oxford_pets.outline({"segmentation_mask": wanted})
    np.testing.assert_array_equal(example["edge"], edges)
    image = np.rint(resample.linear(given["image"], SIZE)).astype(np.uint8)
    np.testing.assert_array_equal(example["image"], image)
    twice = convert(MAPPED[PETS], record([[1, 2]], image=np.full((1, 2, 1), 7)), (8, 8))
    np.testing.assert_array_equal(twice["image"], np.full((8, 8, 3), 7))
    np.testing.assert_array_equal(twice["semseg"], np.repeat([[0, 1]], 8, 0).repeat(4, 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": 37}, "scene has the class 37, but classes are 0 to 36"),
        ({"label": -1}, "scene has the class -1"),
        ({"label": np.zeros(2)}, r"scene has the shape \(2,\), but \(\) is wanted"),
        ({"segmentation_mask": np.full((6, 6, 1), 4)}, "semseg has the class 3"),
        ({"segmentation_mask": np.full((6, 6, 1), 0)}, "semseg has the class -1"),
    ],
)
def test_classes_out_of_range(changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        convert(MAPPED[PETS], record(TRIMAP) | changes, (6, 6))


def test_a_wrong_example_is_named() -> None:
    source = mapped.Mapped(
        mapped.describe(MAPPED[PETS], "test", (6, 6)),
        [record(TRIMAP), record(TRIMAP, label=99)],
        MAPPED[PETS],
    )
    assert source[-2]["scene"] == 4
    with pytest.raises(UserError, match=r"Example 1 of oxford_iiit_pet \(test\): scene has"):
        source[1]
    with pytest.raises(IndexError):
        source[2]


def as_jpeg(path: Path) -> np.ndarray:
    """A picture; one that is no JPEG after being encoded as one."""
    with Image.open(path) as picture:
        if picture.format == "JPEG":
            return np.asarray(picture)
        buffer = BytesIO()
        picture.convert("RGB").save(buffer, "JPEG", quality=95)
    return np.asarray(Image.open(buffer))


def test_records_hold_what_the_files_hold(place: Path, config: DataConfig) -> None:
    for split, listed in (("train", "trainval.txt"), ("test", "test.txt")):
        source = open_source(config, split)
        lines = (place / "annotations" / listed).read_text().splitlines()[1:]
        assert isinstance(source, Source) and len(source) == len(lines) > 2
        assert source.info.tasks == ("semseg", "saliency", "edge", "scene")
        for index, line in enumerate(lines):
            name, label, species, _ = line.split()
            image = as_jpeg(place / f"images/{name}.jpg")
            with Image.open(place / f"annotations/trimaps/{name}.png") as picture:
                trimap = np.asarray(picture)
            given = {"label": int(label) - 1, "image": image}
            wanted = convert(MAPPED[PETS], record(trimap, **given), SIZE)
            found = source[index]
            assert found.keys() == wanted.keys()
            for key, value in found.items():
                np.testing.assert_array_equal(value, wanted[key])


def test_both_mappings_share_what_is_stored(place: Path, config: DataConfig) -> None:
    source = open_source(replace(config, name="oxford_iiit_pet_species"), "train")
    assert [int(source[k]["scene"]) for k in range(4)] == [0, 1, 1, 0]
    assert source.info.labels["scene"].names == ("cat", "dog")
    assert open_source(config, "train").info.labels["scene"].classes == 37
    assert len(list((place / "data/oxford_pets").glob("*/1.0.0"))) == 1
    assert not list((place / "data").glob("**/*incomplete*"))
    assert not (place / "data/downloads").exists()


def test_a_batch_is_a_function_of_its_step(config: DataConfig) -> None:
    first, second = (Training(open_source(config, "train"), 6, 3) for _ in range(2))
    batch = first.batch(2)
    assert batch["image"].shape == (6, *SIZE, 3) and batch["scene"].shape == (6,)
    for key, value in batch.items():
        np.testing.assert_array_equal(value, second.batch(2)[key])
        np.testing.assert_array_equal(value, first.batch(2)[key])  # now remembered
    assert len(list(evaluation(open_source(config, "test"), 2))) == 2


def test_examples_are_decoded_once_where_they_fit() -> None:
    class Counted(list):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    info = mapped.describe(MAPPED[PETS], "train", (6, 6))
    for remember, reads in ((True, 1), (False, 3)):
        records = Counted([record(TRIMAP)])
        source = Mapped(info, records, MAPPED[PETS], remember)
        for _ in range(3):
            source[0].pop("image")  # a caller's own dictionary
        assert records.reads == reads


def test_the_form_of_a_batch_without_any_data(config: DataConfig) -> None:
    blank, real = form_of(replace(config, archive=None, data_dir="/nowhere")), config
    source = open_source(real, "train")
    assert isinstance(blank, Arrays) and blank.info == source.info
    one, other = (Training(s, 2, 0).batch(0) for s in (blank, source))
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {
        k: (v.shape, v.dtype) for k, v in other.items()
    }


def test_an_earlier_conversion_needs_no_archive(config: DataConfig) -> None:
    open_source(config, "test")
    again = open_source(replace(config, archive=None), "test")
    np.testing.assert_array_equal(again[0]["semseg"], open_source(config, "test")[0]["semseg"])


@pytest.fixture
def packed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The two archives, whose checksums are the expected ones."""
    folder = pets.pack(place, tmp_path / "packed")
    infos = {
        url: checksums.compute_url_info(folder / f"{name}.tar.gz")
        for name, url in oxford_pets_builder.URLS.items()
    }
    monkeypatch.setattr(oxford_pets_builder.Pets, "url_infos", infos)
    return folder


def test_archives_as_downloaded_by_hand(packed: Path, config: DataConfig, tmp_path: Path) -> None:
    given = replace(config, archive=str(packed), data_dir=str(tmp_path / "data"))
    source = open_source(given, "train")
    for k in range(len(source)):
        for key, value in open_source(config, "train")[k].items():
            np.testing.assert_array_equal(source[k][key], value)
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["oxford_pets"]
    (packed / "images.tar.gz").write_bytes(b"")  # it is not read again
    assert len(open_source(given, "test")) == 3


def nothing_left(data: Path) -> bool:
    return not [p for p in data.glob("**/*") if p.is_file() and p.name != ".lock"]


def test_a_damaged_archive(packed: Path, config: DataConfig, tmp_path: Path) -> None:
    given = replace(config, archive=str(packed), data_dir=str(tmp_path / "data"))
    path = packed / "images.tar.gz"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match="checksum is not the one that tfds knows"):
        open_source(given, "train")
    infos = oxford_pets_builder.Pets.url_infos
    infos[oxford_pets_builder.URLS["images"]] = checksums.compute_url_info(path)  # type: ignore
    with pytest.raises(UserError, match=r"unpacked \((truncated|unexpected end).*\): download"):
        open_source(given, "train")
    path.unlink()
    with pytest.raises(UserError, match="has no images.tar.gz: put both archives"):
        open_source(given, "train")
    assert nothing_left(tmp_path / "data")


@pytest.fixture
def server(packed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The archives under addresses of this machine; the list of what was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(f"{self.command} {self.path}")

    serving = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(packed)))
    Thread(target=serving.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{serving.server_port}"
    urls = {name: f"{base}/{name}.tar.gz" for name in oxford_pets_builder.URLS}
    infos = {url: checksums.compute_url_info(packed / Path(url).name) for url in urls.values()}
    monkeypatch.setattr(oxford_pets_builder, "URLS", urls)
    monkeypatch.setattr(oxford_pets_builder.Pets, "url_infos", infos)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield asked
    serving.shutdown()
    serving.server_close()


def test_downloading(server: list[str], config: DataConfig, tmp_path: Path) -> None:
    given = replace(config, archive=None, data_dir=str(tmp_path / "data"))
    source = open_source(given, "test")
    np.testing.assert_array_equal(source[1]["image"], open_source(config, "test")[1]["image"])
    assert {line for line in server if line.startswith("GET")} == {
        "GET /images.tar.gz",
        "GET /annotations.tar.gz",
    }
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["oxford_pets"]


def test_finished_downloads_survive_a_failure(
    server: list[str], packed: Path, config: DataConfig, tmp_path: Path, monkeypatch: Any
) -> None:
    given = replace(config, archive=None, data_dir=str(tmp_path / "data"))
    failing = pytest.MonkeyPatch()
    failing.setattr(oxford_pets_builder, "trimap", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_source(given, "train")
    failing.undo()
    assert not (tmp_path / "data/downloads/oxford_pets/extracted").exists()
    first = len(server)
    assert len(open_source(given, "train")) == 4 and len(server) == first == 3


def test_a_server_without_the_archive(
    server: list[str], packed: Path, config: DataConfig, tmp_path: Path
) -> None:
    (packed / "images.tar.gz").unlink()
    given = replace(config, archive=None, data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=r"Cannot download oxford_iiit_pet \(.*404"):
        open_source(given, "train")
    assert not list((tmp_path / "data").glob("**/*.tmp.*"))


def test_no_network(config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(url: str, **_: Any) -> None:
        asked.append(url)
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "head", refuse)
    given = replace(config, archive=None, data_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"Cannot download oxford_iiit_pet \(no route\): try again"):
        open_source(given, "train")
    assert asked == [oxford_pets_builder.URLS["annotations"]] and nothing_left(tmp_path)


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
        ("annotations/test.txt", None, "is missing or cannot be read"),
        ("annotations/test.txt", "cat_1 3 1 1\n", "cat_1.jpg' cannot be read as a picture"),
        ("images/Abyssinian_1.jpg", "", "Abyssinian_1.jpg' cannot be read as a picture"),
        ("annotations/trimaps/beagle_2.png", None, "beagle_2.png' cannot be read"),
    ],
)
def test_a_damaged_file(
    file: str, content: str | None, words: str, config: DataConfig, tmp_path: Path
) -> None:
    root = pets.make_pets(tmp_path / "pets")
    if content is None:
        (root / file).unlink()
    else:
        (root / file).write_text(content)
    given = replace(config, archive=str(root), data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match=words):
        open_source(given, "train")
    assert nothing_left(tmp_path / "data")


def test_a_value_that_no_trimap_has(config: DataConfig, tmp_path: Path) -> None:
    root = pets.make_pets(tmp_path / "pets")
    path = root / "annotations/trimaps/beagle_2.png"
    Image.fromarray(np.full((30, 30), 4, np.uint8)).save(path)
    given = replace(config, archive=str(root), data_dir=str(tmp_path / "data"))
    with pytest.raises(UserError, match="value 4 at row 0, but a trimap has 1, 2 and 3"):
        open_source(given, "train")
    assert nothing_left(tmp_path / "data")


def test_no_folder_and_damaged_records(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.archive is '/nowhere', which is no folder"):
        open_source(replace(config, archive="/nowhere"), "train")
    root = pets.make_pets(tmp_path / "pets")
    given = replace(config, archive=str(root), data_dir=str(tmp_path / "data"))
    open_source(given, "train")
    [shard] = (tmp_path / "data").glob("**/*train.array_record*")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged; delete that folder"):
        open_source(given, "train")


class MappedToy(tfds.core.GeneratorBasedBuilder):
    """A builder like those of the library: depth and a class map of every image."""

    VERSION = tfds.core.Version("2.1.0")
    code_path = None
    fails: Exception | None = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "rgb": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "metres": tfds.features.Tensor(
                shape=(None, None, 1), dtype=np.float32, encoding="zlib"
            ),
            "kinds": tfds.features.Image(shape=(None, None, 1), encoding_format="png"),
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.fails is not None:
            raise self.fails
        for k in range(10):
            yield (
                k,
                {
                    "rgb": png(np.full((8, 8 + k, 3), k, np.uint8)),
                    "metres": np.full((8, 8 + k, 1), k, np.float32),
                    "kinds": png(np.full((8, 8 + k), k % 3, np.uint8)),
                },
            )


TOY = TfdsMapping(
    name="toy",
    dataset="mapped_toy:2.1.0",
    splits={"train": "train[:30%]", "test": "validation"},
    maps=("metres", "kinds"),
    tasks={
        "semseg": lambda record: np.where(record["kinds"] == 2, 255, record["kinds"])[..., 0],
        "depth": lambda record: record["metres"][..., 0],
    },
    labels={"semseg": Labels(("a", "b"), np.zeros((2, 3), np.uint8))},
    image="rgb",
)


def test_any_tfds_data_set(tmp_path: Path) -> None:
    train = mapped.open_mapped(TOY, (10, 12), "train", data_dir=tmp_path)
    test = mapped.open_mapped(TOY, (10, 12), "test", data_dir=tmp_path)
    assert (len(train), len(test)) == (3, 10)
    example = test[2]
    assert (example["image"] == 2).all() and example["image"].shape == (10, 12, 3)
    assert (example["semseg"] == 255).all() and (test[4]["semseg"] == 1).all()
    assert (example["depth"] == 2).all() and example["depth"].dtype == np.float32
    assert (tmp_path / "mapped_toy/2.1.0").is_dir() and not (tmp_path / "downloads").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'tensorflow'"), "a package that is not installed"),
        (requests.Timeout("too slow"), r"Cannot download toy \(too slow"),
        (OSError(28, "No space left on device"), "Cannot prepare toy in .*: No space left"),
    ],
)
def test_preparation_that_fails(
    error: Exception, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MappedToy, "fails", error)
    with pytest.raises(UserError, match=words):
        tfds_store.prepare(TOY, None, tmp_path)
    assert nothing_left(tmp_path) and not list(tmp_path.glob("**/*incomplete*"))


def test_a_data_set_that_tfds_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no data set 'no_such_data'"):
        tfds_store.prepare(replace(TOY, dataset="no_such_data"), None, tmp_path)
