"""WAV files: where their samples lie and what the numbers mean, from the header alone.

Read here and not by a library, because every copy of moezoo and of an export is to read a file
alike, whatever else is installed: SciPy fails on headers of streams and leaves whole numbers
unscaled, libsndfile has no whole numbers of 64 bits and reads other chunks as sound. Little- and
big-endian files (RIFF, RIFX), those beyond 4 GB (RF64, BW64) and extensible headers are known, with
whole numbers of 1 to 8 bytes and floats of 4 and 8.

Imports nothing of the package, because a copy travels in the exports of sound runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

KINDS = {b"RIFF": "<", b"RIFX": ">", b"RF64": "<", b"BW64": "<"}
WHOLE, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE
# What follows the encoding's number in the 16 bytes that name it in extensible headers (RFC 2361).
TAILS = {
    "<": bytes.fromhex("00001000800000aa00389b71"),
    ">": bytes.fromhex("00000010800000aa00389b71"),
}
STREAM = 0x7FFF0000  # what writers that cannot go back put for a length that they do not know
CHUNKS = 10_000  # of a file at most; real ones have a handful


class WavError(ValueError):
    """Why a file cannot be read, as what follows its name."""


class OtherEncoding(WavError):
    """A WAV file whose samples are compressed; another reader may know how."""


class WavFormat(NamedTuple):
    """Samples per second, channels, and the samples' place: `count` of `size` bytes per channel."""

    rate: int
    channels: int
    size: int
    floats: bool
    order: str
    start: int
    count: int


class _Format(NamedTuple):
    rate: int
    channels: int
    size: int
    floats: bool

    @property
    def frame(self) -> int:
        """Bytes of a sample of all channels."""
        return self.channels * self.size


def is_wav(file: BinaryIO) -> bool:
    """Whether an open file begins as a WAV file; the place in it is the beginning afterwards."""
    file.seek(0)
    begin = file.read(12)
    file.seek(0)
    return begin[:4] in KINDS and begin[8:12] == b"WAVE"


def layout(file: BinaryIO) -> WavFormat:
    """What the header of an open WAV file says, checked against the file's own length.

    A data chunk without a length (0 or nearly 2^31 and above, as streams have) goes to the end of
    the file. Raises WavError for a header without sense and for samples that are not all there.
    """
    end = file.seek(0, 2)
    file.seek(0)
    begin = file.read(12)
    order = KINDS[begin[:4]]
    told = _number(begin[4:8], order)
    form: _Format | None = None
    long: int | None = None  # the length that RF64 files keep apart
    for name, start, size in _chunks(file, order, end):
        if name == b"ds64" and begin[:4] in (b"RF64", b"BW64"):
            long = _number(_content(file, start, size, 16)[8:16], order)
        elif name == b"fmt ":
            form = _format(_content(file, start, size, 40), order)
        elif name == b"data":
            if form is None:
                raise WavError("has samples in front of the chunk that says what they are")
            size = long if long is not None and size == 0xFFFFFFFF else size
            # Whoever writes 0 first and never comes back leaves the file's length as it was, too.
            if size == 0 and (told + 8 <= start or told >= STREAM):
                size = STREAM
            return WavFormat(*form, order, start, _there(size, end - start) // form.frame)
    raise WavError(f"has no samples: its header has no chunk '{'data' if form else 'fmt '}'")


def blocks(file: BinaryIO, made: WavFormat, most: int | None, length: int) -> Iterator[np.ndarray]:
    """The first `most` samples (None: all) as float64 [n, channels] in [-1, 1], a block at a time.

    Floats are as they are stored. A block has about `length` numbers. Raises WavError where the
    file ends early.
    """
    left = made.count if most is None else min(most, made.count)
    rows = max(length // made.channels, 1)
    file.seek(made.start)
    while left:
        count = min(rows, left)
        stored = file.read(count * made.channels * made.size)
        if len(stored) < count * made.channels * made.size:
            raise WavError("ends before its samples do")
        yield _numbers(stored, made).reshape(count, made.channels)
        left -= count


def _chunks(file: BinaryIO, order: str, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of every chunk; the length may reach beyond the file."""
    place = 12
    for _ in range(CHUNKS):
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        size = _number(head[4:], order)
        yield head[:4], place + 8, size
        place += 8 + size + size % 2
        if place >= end:
            return


def _content(file: BinaryIO, start: int, size: int, most: int) -> bytes:
    file.seek(start)
    return file.read(min(size, most))


def _format(stored: bytes, order: str) -> _Format:
    """The chunk "fmt ", which has 16, 18 or 40 bytes."""
    if len(stored) < 16:
        raise WavError("has a chunk 'fmt ' that is too short")
    code, channels = _number(stored[:2], order), _number(stored[2:4], order)
    rate, frame = _number(stored[4:8], order), _number(stored[12:14], order)
    bits = _number(stored[14:16], order)
    if code == EXTENSIBLE:
        if len(stored) < 40 or stored[28:40] != TAILS[order]:
            raise OtherEncoding("has an encoding that is not known")
        code = _number(stored[24:28], order)
    if code not in (WHOLE, FLOAT):
        raise OtherEncoding(f"has compressed samples (encoding {code:#06x})")
    size = frame // channels if channels else 0
    if size * channels != frame or size not in _sizes(bits, code == FLOAT):
        raise WavError(
            f"has a header without sense: {channels} channels and {bits} bits in {frame} bytes"
        )
    return _Format(rate, channels, size, code == FLOAT)


def _sizes(bits: int, floats: bool) -> tuple[int, ...]:
    """The bytes that a sample of so many bits may have.

    Fewer bits than the bytes hold are the upper ones, so that full scale is that of the bytes; 24
    bits are in 3 bytes, or in the 4 of a number that processors know.
    """
    if floats:
        return {32: (4,), 64: (8,)}.get(bits, ())
    if bits <= 8:
        return (1,) if bits == 8 else ()
    least = -(-bits // 8)
    return (least, 1 << (least - 1).bit_length()) if bits <= 64 else ()


def _there(size: int, left: int) -> int:
    """The bytes of samples; `left` are there up to the end of the file."""
    if left < size < STREAM:
        raise WavError(f"is cut off: {size} bytes of samples are announced, {left} are there")
    return min(size, left)


def _numbers(stored: bytes, made: WavFormat) -> np.ndarray:
    """Stored samples as float64 [n]."""
    if made.floats:
        with np.errstate(invalid="ignore"):  # NaN of a kind that signals is NaN, too
            return np.frombuffer(stored, f"{made.order}f{made.size}").astype(np.float64)
    if made.size == 1:  # the only ones without a sign
        return (np.frombuffer(stored, np.uint8).astype(np.float64) - 128) / 128
    width = next(n for n in (2, 4, 8) if n >= made.size)
    if width > made.size:  # as the upper bytes of a number that NumPy knows
        given = np.frombuffer(stored, np.uint8).reshape(-1, made.size)
        wide = np.zeros((len(given), width), np.uint8)
        part = slice(width - made.size, None) if made.order == "<" else slice(made.size)
        wide[:, part] = given
        stored = wide.tobytes()
    return np.frombuffer(stored, f"{made.order}i{width}").astype(np.float64) / 2.0 ** (
        8 * width - 1
    )


def _number(stored: bytes, order: str) -> int:
    return int.from_bytes(stored, "little" if order == "<" else "big")
