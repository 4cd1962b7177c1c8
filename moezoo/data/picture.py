"""Picture files and arrays as 8-bit colours: the one place that reads them, and its rules.

Formats   those in `FORMATS`, by content, never by name: some of the others start programs
          (PostScript) or load libraries. If a file has several pictures, the first one is read.
Depth     16-bit whole numbers keep their upper 8 bits; floats must lie in 0 to 1, where 1 becomes
          255; other whole numbers must lie in 0 to 255. Unknown ranges are refused.
Colours   grey, palette, CMYK and YCbCr become RGB.
Alpha     transparent pixels are put on white, as viewers show them.
Upright   turned by EXIF's orientation, as viewers (and people who label in them) see it.
Size      files of at most `MOST_BYTES`, pictures of at most `MOST_PIXELS`, by their headers.

Needs NumPy and Pillow, not moezoo: a copy is part of exports.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

if __package__:
    from moezoo import regular
else:
    import regular  # pyright: ignore[reportMissingImports]

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF", "PPM")
MOST_BYTES = 500 * regular.MB
MOST_PIXELS = 50_000_000
WHITE = (255, 255, 255, 255)
ORIENTATION, BITS, SAMPLES, MEANING = 274, 258, 339, 262  # tags of EXIF and TIFF
# Pillow's names for the turns that undo an orientation.
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# Pillow keeps 16 bits of one channel in these; more channels come with their upper 8.
WHOLE = ("I;16", "I;16L", "I;16B", "I;16N", "I")
STORED = ("1", "L", "P", *WHOLE, "RGB", "RGBA")
_QUIET = threading.Lock()  # for Python's warning filters, which all threads share


class PictureError(Exception):
    """A picture cannot be read: what is wrong with it, phrased to follow its name in a sentence."""


def rgb(given: str | Path | bytes) -> np.ndarray:
    """A picture file, or its bytes, as uint8 RGB [height, width, 3] by this file's rules.

    Raises PictureError if it is missing, not a picture, damaged or has no known range.
    """
    with _opened(given) as image:
        return colours(_upright(image))


def stored(given: str | Path | bytes) -> np.ndarray:
    """The stored numbers of a picture of labels, upright; colours are not changed.

    [height, width] for one channel (for a palette, the indices), uint8 or uint16; else [height,
    width, channels] uint8. Raises PictureError for other kinds of picture.
    """
    with _opened(given) as image:
        if image.mode not in STORED:
            raise PictureError(f"has pixels of the kind '{image.mode}', not plain numbers")
        if image.mode in ("1", "L") and _packing(image) != image.mode:
            raise PictureError(
                "has grey that readers spread over 0 to 255 or invert (save it with 8 bits and "
                "black as 0)"
            )
        upright = _upright(image)
        return _unsigned(upright) if image.mode in WHOLE else np.array(upright).astype(np.uint8)


def size_of(given: str | Path | bytes) -> tuple[int, int]:
    """Height and width, upright, from the header. Raises PictureError."""
    with _opened(given) as image:
        turn = _orientation(image)
        if image.format == "TIFF":  # versions of Pillow differ in when they turn it
            image = image if turn == 1 else _upright(image)
            turn = 1
        width, height = image.size
        return (width, height) if turn >= 5 else (height, width)


def is_plain(given: str | Path | bytes, kind: str | None = None) -> bool:
    """Whether every reader decodes the file as `rgb` does: 8-bit RGB, no alpha, upright.

    kind: the format that it must also have.
    """
    with _opened(given) as image:
        turn, kind_of_file = _orientation(image), image.format
        plain = image.mode == "RGB" and turn == 1 and "transparency" not in image.info
        return plain and kind in (None, kind_of_file)


def colours(image: Any) -> np.ndarray:
    """A Pillow image as uint8 RGB [height, width, 3] by this file's rules. Raises PictureError."""
    from PIL import Image

    if image.mode in WHOLE:
        return _of_sixteen_bits(image)
    if image.mode == "F":
        return eight_bits(np.asarray(image))
    try:
        if image.has_transparency_data:
            shown = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", shown.size, WHITE), shown)
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise PictureError(f"has colours of the kind '{image.mode}', which are unknown") from error


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Decoded pixels as uint8 RGB [height, width, 3] by this file's rules.

    values: [height, width], or [height, width, channels] with grey, grey and alpha, RGB, or RGB
    and alpha; any type of numbers. Raises PictureError for others and for unknown ranges.
    """
    values = np.asarray(values)
    values = values[..., None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[2] not in (1, 2, 3, 4) or 0 in values.shape:
        raise PictureError(f"has the shape {values.shape}, not [height, width, 1 to 4 channels]")
    made = _in_bytes(values)
    count = made.shape[2]
    shown = made[..., :-1] if count in (2, 4) else made
    shown = np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown
    if count in (1, 3):
        return np.ascontiguousarray(shown)
    share = made[..., -1:].astype(np.float32) / 255
    return np.rint(share * shown + (1 - share) * 255).astype(np.uint8)


def _in_bytes(values: np.ndarray) -> np.ndarray:
    kind, name = values.dtype.kind, values.dtype.name
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.newbyteorder("=") == np.uint16:
        return (values >> 8).astype(np.uint8)
    if kind == "f":
        _check_range(values, 1.0, f"floats ({name}) must lie in 0 to 1")
        return np.rint(values.astype(np.float32) * np.float32(255)).astype(np.uint8)
    if kind in "iu":
        _check_range(values, 255, f"whole numbers of the type {name} must lie in 0 to 255")
        return values.astype(np.uint8)
    raise PictureError(f"has pixels of the type {name}, which are no colours")


def _check_range(values: np.ndarray, most: float, words: str) -> None:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= most):  # also if one of them is not a number
        wrong = high if 0 <= low else low
        raise PictureError(f"has a pixel of {wrong:g}, but {words}")


def _of_sixteen_bits(image: Any) -> np.ndarray:
    values, clear = _unsigned(image), image.info.get("transparency")
    made = eight_bits(values << (16 - _bits(image)))
    if isinstance(clear, int):  # the one value that is transparent
        made[values == clear] = 255
    return made


def _unsigned(image: Any) -> np.ndarray:
    """One channel as uint16; TIFF has other whole numbers, too, under the same modes."""
    bits, kind = _bits(image), image.tag_v2.get(SAMPLES, 1) if image.format == "TIFF" else 1
    kind = kind[0] if isinstance(kind, tuple) else kind
    if kind != 1 or not 8 < bits <= 16:
        signed = "signed " if kind == 2 else ""
        raise PictureError(
            f"has {signed}whole numbers of {bits} bits, whose range is unknown (save it with 8 or "
            "16 bits without sign)"
        )
    return np.asarray(image).astype(np.uint16)


def _bits(image: Any) -> int:
    bits = image.tag_v2.get(BITS, 16) if image.format == "TIFF" else 16
    return int(bits[0] if isinstance(bits, tuple) else bits)


def _packing(image: Any) -> str:
    """How pixels are packed in the file, by Pillow's decoder names: 'L;2' has four in a byte."""
    if not getattr(image, "tile", None):
        return image.mode
    codec, _, _, arguments = image.tile[0]
    first = arguments[0] if isinstance(arguments, tuple) else arguments
    if codec.startswith("ppm"):  # has its own largest value
        return f"{first};{arguments[1]}"
    return first if isinstance(first, str) else image.mode


def _check_meaning(image: Any) -> None:
    """Raise PictureError for numbers in a TIFF file that Pillow would misread."""
    if image.format != "TIFF":
        return
    kinds = image.tag_v2.get(SAMPLES, 1)
    if image.mode not in WHOLE and 2 in (kinds if isinstance(kinds, tuple) else (kinds,)):
        raise PictureError("has signed whole numbers, whose range is unknown (save it without)")
    if image.mode in (*WHOLE, "F") and image.tag_v2.get(MEANING) == 0:
        raise PictureError(
            "has white as 0, which is read for 8 bits only (save it with black as 0)"
        )


def _scale_clear_value(image: Any) -> None:
    """Pillow spreads grey of 1, 2 and 4 bits over 0 to 255, but not the transparent value.

    Raises PictureError if the transparent colour has 16 bits, of which Pillow keeps 8.
    """
    clear, packing = image.info.get("transparency"), _packing(image)
    bits = {"1": 1, "L;2": 2, "L;4": 4}.get(packing)
    if image.format == "PNG" and isinstance(clear, int) and bits:
        image.info["transparency"] = clear * 255 // (2**bits - 1)
    if isinstance(clear, tuple) and ";16" in packing:
        raise PictureError("has a transparent colour of 16 bits (save it with alpha, or with 8)")


@contextmanager
def _opened(given: str | Path | bytes) -> Iterator[Any]:
    """The image, its pixels not decoded yet; anything that goes wrong becomes a PictureError."""
    from PIL import Image

    try:
        with _QUIET, warnings.catch_warnings():  # about sizes, which are checked here
            warnings.simplefilter("ignore")
            opened = Image.open(_source(given), formats=FORMATS)
        with opened as image:
            if image.width * image.height > MOST_PIXELS:
                raise PictureError(
                    f"has {image.width} x {image.height} pixels, but at most "
                    f"{MOST_PIXELS // 10**6} million are read (make it smaller)"
                )
            # A phone's photo (MPO) has a preview behind it: the first is the photo.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise PictureError("has several frames (save the one that is meant by itself)")
            yield image
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError("has more pixels than are read (make it smaller)") from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(
            f"is not a picture in one of the formats {', '.join(FORMATS)}"
        ) from error
    except MemoryError as error:
        raise PictureError("needs more memory than there is (make it smaller)") from error
    except Exception as error:  # decoders raise whatever the bytes make them raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise PictureError(f"is damaged or not a picture ({reason})") from error


def _source(given: str | Path | bytes) -> str | Path | BytesIO:
    if isinstance(given, bytes):
        return BytesIO(given)
    if (wrong := regular.trouble(given, MOST_BYTES)) is not None:
        raise PictureError(wrong)
    return given


def _orientation(image: Any) -> int:
    """EXIF's, 1 (as it is) to 8. In a PNG file only data before the pixels is read."""
    if image.format == "PNG" and not {"exif", "xmp", "Raw profile type exif"} & set(image.info):
        return 1  # Pillow would decode it to look behind its pixels
    found = image.getexif().get(ORIENTATION, 1)
    return found if found in range(1, 9) else 1


def _upright(image: Any) -> Any:
    """The decoded image, turned; Pillow turns TIFF files itself."""
    from PIL import Image

    _check_meaning(image)
    _scale_clear_value(image)
    image.load()
    turn = 1 if image.format == "TIFF" else _orientation(image)
    return image if turn == 1 else image.transpose(Image.Transpose[TURNS[turn]])
