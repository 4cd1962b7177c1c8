"""Pictures in records of any tfds data set: as they were stored, or refused, nothing else."""

from __future__ import annotations

import types
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from moezoo.data import records, store
from moezoo.data.store import DamagedStore
from tests.data.test_picture import EIGHT, GREY16, ON_WHITE, RGBA, palette, stored

Image = tfds.features.Image
METRES = np.array([[[0.5], [2.5]]], np.float32)


class Kinds(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """One example; the files stand in the records as they are given."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None
    held: dict[str, Any] = {}
    features: dict[str, Any] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(self.features)
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        held = {k: BytesIO(v) if isinstance(v, bytes) else v for k, v in self.held.items()}
        yield 0, held


def kind(features: dict[str, Any], held: dict[str, Any]) -> Any:
    """The class of a builder that writes this example."""
    own = {"features": features, "held": held, "name": "kinds"}
    return types.new_class("Own", (Kinds,), {"skip_registration": True}, lambda n: n.update(own))


def opened(folder: Path, features: dict[str, Any], held: dict[str, Any]) -> Any:
    """The records of a data set that holds one example."""
    builder = kind(features, held)(data_dir=str(folder))
    builder.download_and_prepare(file_format="array_record")
    return records.records(builder, "train")


COLOURS = {
    "alpha": (stored(RGBA, "PNG"), ON_WHITE),
    "palette": (
        stored(palette(), "PNG"),
        np.array([[[200, 0, 0], [9, 9, 9], [1, 2, 3]]], np.uint8),
    ),
    "grey of 16 bits": (stored(GREY16, "PNG"), EIGHT),
    "cmyk": (
        stored(palette().convert("RGB").convert("CMYK"), "JPEG", quality=100, subsampling=0),
        None,
    ),
}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_image_is_one_of_colours(name: str, channels: int, tmp_path: Path) -> None:
    held, wanted = COLOURS[name]
    features = {"image": Image(shape=(None, None, channels))}
    found = opened(tmp_path, features, {"image": held})[0]["image"]
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
    if wanted is not None:
        np.testing.assert_array_equal(found, wanted)


def test_other_pictures_are_numbers(tmp_path: Path) -> None:
    features = {
        "image": Image(shape=(None, None, 3)),
        "map": Image(shape=(None, None, 1)),
        "wide": Image(shape=(None, None, 1), dtype=np.uint16),
        "inside": {"map": Image(shape=(None, None, 1))},
    }
    indices = stored(palette(), "PNG")
    held = {
        "image": stored(EIGHT, "PNG"),
        "map": indices,
        "wide": stored(GREY16, "PNG"),
        "inside": {"map": BytesIO(stored(np.array([[7]], np.uint8), "PNG"))},
    }
    found = opened(tmp_path, features, held)[0]
    assert found["map"][..., 0].tolist() == [[0, 1, 2]] and found["map"].dtype == np.uint8
    assert found["wide"].dtype == np.uint16
    np.testing.assert_array_equal(found["wide"][..., 0], GREY16)
    assert found["inside"]["map"].tolist() == [[[7]]]
    floats = Image(shape=(None, None, 1), dtype=np.float32)
    held = stored(METRES.view(np.uint8), "PNG")  # as tfds stores them
    np.testing.assert_array_equal(records.numbers(floats, held), METRES)


@pytest.mark.parametrize("held", [stored(GREY16, "PNG"), stored(RGBA, "PNG"), b"%!PS-Adobe-3.0"])
def test_labels_that_do_not_fit(held: bytes, tmp_path: Path) -> None:
    """tfds takes 16 bits modulo 256 and gives PostScript to another program."""
    features = {"image": Image(shape=(None, None, 3)), "map": Image(shape=(None, None, 1))}
    with pytest.raises(DamagedStore, match="record 0 of train: the picture 'map' (has|is no)"):
        opened(tmp_path, features, {"image": stored(EIGHT, "PNG"), "map": held})


def test_fewer_records_than_the_description_says(tmp_path: Path) -> None:
    """And more: nobody would miss them."""
    features = {"image": Image(shape=(None, None, 3))}
    opened(tmp_path, features, {"image": stored(EIGHT, "PNG")})
    [info] = tmp_path.glob("kinds/*/dataset_info.json")
    text = info.read_text()
    info.write_text(text.replace('"1"', '"2"'))
    with pytest.raises(DamagedStore):
        records.records(kind(features, {})(data_dir=str(tmp_path)), "train")
    store.write_sums(info.parent)
    info.write_text(text)
    with store.opening(tmp_path / "other"):
        pass
    with pytest.raises(DamagedStore, match="dataset_info.json is not as it was written"):
        with store.opening(tmp_path / "kinds"):
            pass
