"""Pictures of every depth and kind become the same 8-bit colours, or are refused with a reason."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from moezoo.data import picture
from moezoo.data.picture import PictureError
from moezoo.domains.images import runtime as photo
from moezoo.domains.images.data import tfds_source
from moezoo.domains.images.data.dense import files
from moezoo.errors import UserError
from tests.data import toy
from tests.robustness import fuzz

GREY16 = np.array([[0, 0x7FFF, 0x80FF, 0xFFFF]], np.uint16)
EIGHT = np.repeat(np.array([[0, 127, 128, 255]], np.uint8)[..., None], 3, -1)
RGBA = np.array([[[200, 0, 0, 255], [200, 0, 0, 102], [1, 2, 3, 0]]], np.uint8)
ON_WHITE = np.array([[[200, 0, 0], [233, 153, 153], [255, 255, 255]]], np.uint8)


def stored(image: Any, kind: str, **more: Any) -> bytes:
    """The bytes of a picture file."""
    out = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **more)
    return out.getvalue()


def palette() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putdata([0, 1, 2])
    image.putpalette([200, 0, 0, 9, 9, 9, 1, 2, 3])
    return image


CASES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "grey png of 16 bits": (lambda: stored(GREY16, "PNG"), EIGHT),
    "grey tiff of 16 bits": (lambda: stored(GREY16, "TIFF"), EIGHT),
    "big-endian tiff": (lambda: stored(GREY16.astype(">u2"), "TIFF"), EIGHT),
    "pgm of 16 bits": (lambda: b"P5 4 1 65535\n" + GREY16.astype(">u2").tobytes(), EIGHT),
    "float tiff": (lambda: stored((EIGHT[..., 0] / 255).astype(np.float32), "TIFF"), EIGHT),
    "rgb with alpha": (lambda: stored(RGBA, "PNG"), ON_WHITE),
    "webp with alpha": (lambda: stored(RGBA, "WEBP", lossless=True, exact=True), ON_WHITE),
    "grey with alpha": (
        lambda: stored(np.array([[[100, 255], [100, 0]]], np.uint8), "PNG"),
        np.array([[[100] * 3, [255] * 3]], np.uint8),
    ),
    "palette": (
        lambda: stored(palette(), "PNG"),
        np.array([[[200, 0, 0], [9, 9, 9], [1, 2, 3]]], np.uint8),
    ),
    "palette with a clear colour": (
        lambda: stored(palette(), "GIF", transparency=1),
        np.array([[[200, 0, 0], [255, 255, 255], [1, 2, 3]]], np.uint8),
    ),
    "16 bits with a clear value": (
        lambda: stored(GREY16, "PNG", transparency=0x7FFF),
        np.where(np.arange(4)[:, None] == 1, 255, EIGHT),
    ),
    "cmyk": (
        lambda: stored(Image.new("CMYK", (1, 1), (0, 255, 0, 0)), "TIFF"),
        np.array([[[255, 0, 255]]], np.uint8),
    ),
    "black and white": (lambda: stored(EIGHT[..., 0] > 127, "PNG"), EIGHT // 128 * 255),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_file_by_every_reader(name: str, tmp_path: Path) -> None:
    make, wanted = CASES[name]
    (path := tmp_path / "given.png").write_bytes(make())
    for read in (picture.rgb, photo.read, files.rgb):
        found = read(path)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, wanted)
    assert picture.size_of(path) == wanted.shape[:2] and not picture.is_plain(path)


def png(bits: int, kind: int, row: bytes, clear: bytes = b"", width: int = 4) -> bytes:
    """A PNG file of one row as other programs write them: Pillow packs no grey."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", width, 1, bits, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"tRNS", clear) if clear else b""]
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("bits", "row", "clear", "wanted"),
    [
        (1, b"\x50", 0, [255, 255, 255, 255]),
        (1, b"\x50", 1, [0, 255, 0, 255]),
        (2, b"\x1b", 1, [0, 255, 170, 255]),
        (4, b"\x01\x2f", 2, [0, 17, 255, 255]),
    ],
)
def test_packed_grey_with_a_clear_value(bits: int, row: bytes, clear: int, wanted: list) -> None:
    made = picture.rgb(png(bits, 0, row, clear.to_bytes(2, "big")))
    assert made[0, :, 1].tolist() == wanted


def test_a_clear_colour_of_sixteen_bits() -> None:
    with pytest.raises(PictureError, match="has a transparent colour of 16 bits"):
        picture.rgb(png(16, 2, bytes(6), bytes(6), width=1))


@pytest.mark.parametrize("given", [png(2, 0, b"\x1b"), png(4, 0, b"\x01\x23"), b"P5 3 1 3\nabc"])
def test_packed_grey_is_no_map_of_labels(given: bytes) -> None:
    assert picture.rgb(given).shape[0] == 1
    with pytest.raises(PictureError, match="has grey that readers spread over 0 to 255"):
        picture.stored(given)


def tiff(bits: int, meaning: int, sample: int, row: bytes) -> bytes:
    """A TIFF file of one row of two pixels; meaning 0: white is 0; sample 2: signed, 3: float."""
    tags = {256: 2, 257: 1, 258: bits, 259: 1, 262: meaning, 273: 122, 277: 1, 279: len(row)}
    tags[339] = sample
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + row


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (tiff(16, 0, 1, bytes(4)), "has white as 0"),
        (tiff(32, 0, 3, bytes(8)), "has white as 0"),
        (tiff(8, 1, 2, bytes(2)), "has signed whole numbers"),
    ],
)
def test_tiff_files_whose_numbers_mean_something_else(given: bytes, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        picture.rgb(given)
    assert picture.rgb(tiff(8, 0, 1, b"\0\xff"))[0, :, 0].tolist() == [255, 0]


ARRAYS: dict[str, tuple[np.ndarray, np.ndarray]] = {
    "uint16": (GREY16[..., None], EIGHT),
    "uint16 of three": (np.repeat(GREY16[..., None], 3, -1), EIGHT),
    "big-endian": (GREY16.astype(">u2")[..., None], EIGHT),
    "float32": ((EIGHT / 255).astype(np.float32), EIGHT),
    "float64 of one": (EIGHT[..., :1] / 255, EIGHT),
    "float with alpha": ((RGBA / 255).astype(np.float32), ON_WHITE),
    "alpha": (RGBA, ON_WHITE),
    "grey with alpha": (RGBA[:, 1:, 2:], np.array([[[153] * 3, [255] * 3]], np.uint8)),
    "int64": (EIGHT.astype(np.int64), EIGHT),
    "bool": ((EIGHT > 127)[..., :1], EIGHT // 128 * 255),
    "no channels": (EIGHT[..., 0], EIGHT),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_every_kind_of_array_in_a_record(name: str) -> None:
    given, wanted = ARRAYS[name]
    np.testing.assert_array_equal(picture.eight_bits(given), wanted)
    height, width = wanted.shape[:2]
    maps = {key: np.zeros((height, width, 1), np.float32) for key in toy.MAPPING.maps}
    example = tfds_source.convert(toy.MAPPING, {"rgb": given, **maps}, (height, width))
    np.testing.assert_array_equal(example["image"], wanted)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[0.0, 1.5]]), "has a pixel of 1.5, but floats .float64. must lie in 0 to 1"),
        (np.array([[0.0, np.nan]], np.float32), "has a pixel of nan, but floats"),
        (np.array([[0.0, -np.inf]], np.float16), "has a pixel of -inf, but floats"),
        (np.array([[0, 256]]), "has a pixel of 256, but whole numbers of the type int64"),
        (np.array([[-1, 7]], np.int16), "has a pixel of -1, but whole numbers of the type int16"),
        (np.zeros((2, 2), complex), "has pixels of the type complex128, which are no colours"),
        (np.zeros((2, 2, 5), np.uint8), r"has the shape \(2, 2, 5\)"),
        (np.zeros((0, 2, 3), np.uint8), r"has the shape \(0, 2, 3\)"),
    ],
)
def test_numbers_without_a_known_range(values: np.ndarray, words: str) -> None:
    with pytest.raises(PictureError, match=words):
        picture.eight_bits(values)
    with pytest.raises(UserError, match=f"the image {words}.*: correct the data"):
        tfds_source.convert(toy.MAPPING, {"rgb": values, "metres": 0, "kinds": 0}, (8, 8))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[5, 2**30]], np.int32), "signed whole numbers of 32 bits"),
        (np.array([[0, 200]], np.float32), "a pixel of 200, but floats"),
        (np.array([[0, np.nan]], np.float32), "a pixel of nan, but floats"),
    ],
)
def test_tiff_files_without_a_known_range(values: np.ndarray, words: str, tmp_path: Path) -> None:
    (path := tmp_path / "given.tif").write_bytes(stored(values, "TIFF"))
    with pytest.raises(photo.ExportError, match=f"given.tif cannot be read, it has {words}"):
        photo.read(path)
    with pytest.raises(UserError, match=f"given.tif' cannot be read as a picture, it has {words}"):
        files.rgb(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[picture.ORIENTATION] = orientation
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 3)).astype(np.uint8)
    given = stored(image, kind, exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(given))).convert("RGB"))
    np.testing.assert_array_equal(picture.rgb(given), wanted)
    np.testing.assert_array_equal(picture.stored(given), wanted)
    assert picture.size_of(given) == wanted.shape[:2]
    assert picture.is_plain(given) == (orientation == 1)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_one_frame_of_several_is_not_chosen(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = stored(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(PictureError, match="several frames"):
        picture.rgb(moving)
    assert picture.rgb(stored(frames[0], kind)).shape == (8, 8, 3)


def test_a_phones_photo_with_a_preview_is_the_photo() -> None:
    photo_, preview = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (4, 4), "blue")
    given = stored(photo_, "MPO", save_all=True, append_images=[preview])
    assert picture.rgb(given).shape == (8, 8, 3)


def test_labels_keep_their_numbers(tmp_path: Path) -> None:
    (path := tmp_path / "map.png").write_bytes(stored(palette(), "PNG", transparency=1))
    assert files.single(path).tolist() == [[0, 1, 2]]
    for values, words in [
        (GREY16, "not a map of 8-bit labels"),
        (RGBA, "not a map of 8-bit labels"),
    ]:
        path.write_bytes(stored(values, "PNG"))
        with pytest.raises(UserError, match=words):
            files.single(path)
    assert picture.stored(stored(GREY16, "PNG")).tolist() == GREY16.tolist()


@pytest.mark.parametrize("values", [RGBA, EIGHT[..., 0], GREY16])
def test_vectors_are_plain_colours(values: np.ndarray, tmp_path: Path) -> None:
    (path := tmp_path / "normals.png").write_bytes(stored(values, "PNG"))
    with pytest.raises(UserError, match="three plain channels"):
        files.vectors(path)
    path.write_bytes(stored(RGBA[..., :3], "PNG"))
    np.testing.assert_array_equal(files.vectors(path), RGBA[..., :3])


def bomb(side: int) -> bytes:
    """A PNG file of a few bytes that says it has side x side pixels."""
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", b"x"))
    made = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


@pytest.mark.parametrize("side", [8_000, 13_000, 60_000])
def test_sizes_are_checked_before_anything_is_decoded(side: int, tmp_path: Path) -> None:
    (path := tmp_path / "bomb.png").write_bytes(bomb(side))
    for read in (photo.read, files.rgb, files.single, files.size_of):
        outcome = fuzz.attempted(partial(read, path), (UserError, photo.ExportError))
        assert outcome.kind == "refused" and "pixels" in outcome.detail, outcome


def test_postscript_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program named `gs` on the path would leave a mark."""
    (gs := tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    gs.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (path := tmp_path / "photo.png").write_bytes(stored(RGBA[..., :3], "EPS"))
    for read in (photo.read, files.rgb, files.single, files.size_of):
        with pytest.raises((UserError, photo.ExportError), match="is not a picture in one of the"):
            read(path)
    assert not (tmp_path / "ran").exists()


def test_every_opening_names_its_formats() -> None:
    root = Path(picture.__file__).parents[1]
    for path in root.rglob("*.py"):
        for line in path.read_text().splitlines():
            assert "Image.open(" not in line or "formats=" in line, (path, line)


@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder", "nothing"])
def test_what_is_no_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "given"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    readers: list[Callable[[Path], Any]] = [files.rgb, files.single, files.size_of, files.metres]
    readers += [files.text, lambda p: files.matlab(p, "x"), photo.read, files.vectors]
    for read in readers:
        with fuzz.limit(5), pytest.raises((UserError, photo.ExportError), match="given'? .*is "):
            read(path)


def test_arrays_and_matlab_files_that_say_they_are_huge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A header of 10^12 numbers; many zeros in few bytes."""
    monkeypatch.setattr(files, "MOST_INFLATED", 10**7)
    (depth := tmp_path / "depth.npy").write_bytes(b"")
    with open(depth, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
    maps = tmp_path / "map.mat"
    packed = zlib.compress(bytes(2 * 10**7), 1)
    start = b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM"
    maps.write_bytes(start + struct.pack("<II", 15, len(packed)) + packed)
    for read, path, words in [
        (files.metres, depth, "cannot be read as a NumPy array"),
        (lambda p: files.matlab(p, "x"), maps, "unpack to more than is read"),
    ]:
        outcome = fuzz.attempted(partial(read, path))
        assert outcome.kind == "refused" and words in outcome.detail, outcome
