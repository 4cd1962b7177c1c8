"""Damaged pictures, arrays and stored data sets: accepted and right, or one sentence."""

from __future__ import annotations

import random
import shutil
import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from moezoo.data import picture
from moezoo.domains.images import runtime as photo
from moezoo.domains.images.data import tfds_source
from moezoo.domains.images.data.dense import files, pascal
from moezoo.domains.images.domain import DataConfig, open_source
from moezoo.errors import UserError
from tests.data import toy
from tests.domains.images.data import archives
from tests.robustness import fuzz

SIZE = (12, 10)
REFUSALS = (UserError, photo.ExportError)


def pictures() -> dict[str, bytes]:
    """Sound files of many kinds."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    image, exif = Image.fromarray(colours), Image.Exif()
    exif[picture.ORIENTATION] = 6
    alpha = rng.integers(0, 256, (*SIZE, 4)).astype(np.uint8)
    wide = rng.integers(0, 1 << 16, SIZE).astype(np.uint16)
    made: list[tuple[str, Any, str, dict[str, Any]]] = [
        ("plain", image, "PNG", {}),
        ("turned", image, "JPEG", {"exif": exif}),
        ("alpha", Image.fromarray(alpha), "PNG", {}),
        ("wide", Image.fromarray(wide), "PNG", {}),
        ("wide tiff", Image.fromarray(wide), "TIFF", {}),
        ("floats", Image.fromarray(rng.random(SIZE).astype(np.float32)), "TIFF", {}),
        ("packed", image, "TIFF", {"compression": "tiff_lzw"}),
        ("palette", image.quantize(9), "GIF", {"transparency": 1}),
        ("webp", Image.fromarray(alpha), "WEBP", {"lossless": True}),
        ("bmp", image, "BMP", {}),
        ("ppm", image, "PPM", {}),
    ]
    found = {}
    for name, one, kind, more in made:
        one.save(out := BytesIO(), kind, **more)
        found[name] = out.getvalue()
    return found


PICTURES = pictures()


def with_header(chance: random.Random) -> tuple[str, bytes]:
    """A PNG whose header says something else, with the right checksum."""
    data, at = bytearray(PICTURES["plain"]), 16
    sides = [chance.choice((0, 1, 10, 5000, 13_000, 2**31 - 1, 2**32 - 1)) for _ in range(2)]
    kind = [chance.choice((1, 8, 16, 99)), chance.choice((0, 2, 3, 4, 6, 9)), 0, 0]
    kind[3] = chance.choice((0, 1, 7))
    data[at : at + 13] = struct.pack(">IIBBBBB", *sides, *kind, 0)
    data[at + 13 : at + 17] = struct.pack(">I", zlib.crc32(data[12 : at + 13]))
    return f"header {sides} {kind}", bytes(data)


@fuzz.counts(ci=4, full=80)
def test_damaged_pictures(count: int, tmp_path: Path) -> None:
    """What is accepted is a picture, and the same one for whoever reads it."""
    path = tmp_path / "photo.png"

    def case(chance: random.Random) -> fuzz.Case:
        name = chance.choice([*PICTURES, "header"])
        if name == "header":
            what, data = with_header(chance)
        else:
            what, data = fuzz.mutate_bytes(chance, PICTURES[name])
        path.write_bytes(data)

        def attempt() -> None:
            found = photo.read(path)
            assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
            assert found.shape[:2] == files.size_of(path)
            np.testing.assert_array_equal(files.rgb(path), found)

        return f"{name}: {what}", attempt

    fuzz.run("pictures", case, count, REFUSALS)


@fuzz.counts(ci=4, full=80)
def test_damaged_labels(count: int, tmp_path: Path) -> None:
    """Maps of numbers, vectors, depths and MATLAB files of archives."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 9, SIZE).astype(np.uint8)).save(tmp_path / "map.png")
    (tmp_path / "normals.png").write_bytes(PICTURES["plain"])
    np.save(tmp_path / "depth.npy", rng.random(SIZE).astype(np.float32))
    regions, parts = tmp_path / "regions.mat", tmp_path / "parts.mat"
    scipy.io.savemat(regions, {"LabelMap": np.ones(SIZE, np.uint16)}, do_compression=True)
    archives.save_people(parts, [archives.person({"head": np.ones(SIZE, bool)})])
    readers: dict[str, Any] = {
        "map.png": files.single,
        "normals.png": files.vectors,
        "depth.npy": files.metres,
        "regions.mat": lambda path: files.matlab(path, "LabelMap"),
        "parts.mat": lambda path: pascal.parts_map(path, SIZE),
    }
    sound = {name: (tmp_path / name).read_bytes() for name in readers}

    def case(chance: random.Random) -> fuzz.Case:
        name = chance.choice(list(readers))
        what, data = fuzz.mutate_bytes(chance, sound[name])
        (path := tmp_path / name).write_bytes(data)

        def attempt() -> None:
            found = readers[name](path)
            assert isinstance(found, np.ndarray), type(found)
            if name == "depth.npy":
                assert np.isfinite(found).all() and (found >= 0).all()

        return f"{name}: {what}", attempt

    fuzz.run("labels", case, count)


def damaged(chance: random.Random, folder: Path) -> str:
    """Damages one file of a stored data set; what was done."""
    path = chance.choice(sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"))
    kind = chance.random()
    if kind < 0.1:
        path.unlink()
        return f"{path.name} removed"
    what, data = fuzz.mutate_bytes(chance, path.read_bytes())
    path.write_bytes(data)
    if kind > 0.6 and (sums := path.parent / "sums.json").exists():  # as an older version had it
        sums.unlink()
        what += ", no sums"
    return f"{path.name}: {what}"


@fuzz.counts(ci=2, full=60)
@pytest.mark.parametrize("whose", ["ours", "the user's"])
def test_damaged_stored_data_sets(whose: str, count: int, tmp_path: Path) -> None:
    """Rooms are made again; others are refused; whatever is accepted is what was stored."""
    store, sound = tmp_path / "data", tmp_path / "sound"
    rooms = DataConfig(resolution=(8, 8), train=3, test=2, data_dir=str(store))

    def opened() -> list[dict[str, np.ndarray]]:
        if whose == "ours":
            source: Any = open_source(rooms, "test")
        else:
            source = tfds_source.open_mapped(toy.MAPPING, (8, 8), "test", data_dir=store)
        return [source[k] for k in range(len(source))]

    wanted = opened()
    shutil.copytree(store, sound)

    def case(chance: random.Random) -> fuzz.Case:
        shutil.rmtree(store)
        shutil.copytree(sound, store)
        what = damaged(chance, store)

        def attempt() -> None:
            found = opened()
            assert len(found) == len(wanted)
            for one, other in zip(found, wanted, strict=True):
                for name, value in other.items():
                    np.testing.assert_array_equal(one[name], value)

        return what, attempt

    found = fuzz.run(f"stored data sets, {whose}", case, count)
    assert whose != "ours" or set(found) == {"accepted"}
