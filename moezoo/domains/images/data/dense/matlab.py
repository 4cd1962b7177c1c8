"""MATLAB files, checked for structure before SciPy reads them: damaged ones crash its reader.

Files of version 5, as MATLAB has written them since 1996: elements with a type, a length and bytes
that may be elements again. Arrays of numbers and text, structures and cells are accepted.
"""

from __future__ import annotations

import math
import zlib
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import scipy.io

START, VERSION = 128, 0x0100
MATRIX, COMPRESSED, INT8, INT32, UINT32, UTF8 = 14, 15, 1, 5, 6, 16
WIDTHS = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8, UTF8: 1, 17: 2, 18: 4}
CELL, STRUCT, TEXT, NUMBERS, COMPLEX = 1, 2, 4, range(6, 16), 0x0800
DEEPEST, MOST_SIDES, LONGEST_NAME = 16, 8, 64


class MatlabFault(ValueError):
    """What is wrong with the bytes."""


class Element(NamedTuple):
    """An element's type, its bytes, and where the next one begins."""

    kind: int
    data: memoryview
    end: int


def load(stored: bytes, name: str, most: int) -> Any:
    """One variable of a MATLAB file as SciPy gives it.

    Raises KeyError if the file has none of this name, and MatlabFault if it is not such a file
    or would unpack to more than `most` bytes.
    """
    check(stored, most)
    return scipy.io.loadmat(BytesIO(stored), variable_names=[name])[name]


def check(stored: bytes, most: int) -> None:
    """Raise MatlabFault if the structure of a file is not valid."""
    if len(stored) < START or stored[126:128] not in (b"IM", b"MI"):
        raise MatlabFault("not a file of version 5")
    order = "<" if stored[126:128] == b"IM" else ">"
    if _whole(stored[124:126], order, "u2")[0] != VERSION:
        raise MatlabFault("a version other than 5")
    at, total, view = START, 0, memoryview(stored)
    while at < len(view):
        found = _element(view, at, order, padded=False)
        if found.kind == COMPRESSED:
            unpacked = _unpacked(found.data, most - total)
            total += len(unpacked)
            inner = _element(memoryview(unpacked), 0, order)
        else:
            inner = found
        if inner.kind != MATRIX:
            raise MatlabFault("a variable that is not an array")
        _check_array(inner.data, order, 0)
        at = found.end


def _unpacked(packed: memoryview, most: int) -> bytes:
    unpacking = zlib.decompressobj()
    made = unpacking.decompress(packed, most + 1)
    if len(made) > most or not unpacking.eof:
        raise MatlabFault("it would unpack to more than is read, or is incomplete")
    return made


def _element(view: memoryview, at: int, order: str, padded: bool = True) -> Element:
    """The element at a place; in the short form, type and length share four bytes."""
    if at + 8 > len(view):
        raise MatlabFault("an element is incomplete")
    first, length = (int(x) for x in _whole(view[at : at + 8], order, "u4"))
    if first >> 16:
        kind, length, start, end = first & 0xFFFF, first >> 16, at + 4, at + 8
        if length > 4:
            raise MatlabFault("a short element is too long")
    else:
        kind, start = first, at + 8
        end = start + (length + -length % 8 if padded else length)
        end = min(end, len(view)) if start + length <= len(view) else end
    if end > len(view):
        raise MatlabFault("an element is longer than its container")
    return Element(kind, view[start : start + length], end)


def _check_array(view: memoryview, order: str, depth: int) -> None:
    """Flags, sizes, a name, and as many elements or numbers as the sizes say."""
    if not len(view):
        return
    if depth > DEEPEST:
        raise MatlabFault("structures are nested too deeply")
    flags = _element(view, 0, order)
    sides, name = _two(view, flags.end, order)
    if flags.kind != UINT32 or len(flags.data) != 8 or sides.kind != INT32 or name.kind != INT8:
        raise MatlabFault("an array has no flags, sizes or name")
    word = int(_whole(flags.data, order, "u4")[0])
    shape = _whole(sides.data, order, "i4")
    if not 2 <= len(shape) <= MOST_SIDES or (shape < 0).any() or len(name.data) >= LONGEST_NAME:
        raise MatlabFault("an array has no valid sizes or name")
    count, kind = math.prod(int(side) for side in shape), word & 0xFF
    if kind in (CELL, STRUCT):
        start, fields = (name.end, 1) if kind == CELL else _fields(view, name.end, order)
        _check_parts(view, start, count * fields, order, depth)
    elif kind in NUMBERS or kind == TEXT:
        at = name.end
        for _ in range(2 if word & COMPLEX else 1):
            at = _check_numbers(view, at, count, kind == TEXT, order)
    else:
        raise MatlabFault(f"an array of the kind {kind}")


def _two(view: memoryview, at: int, order: str) -> tuple[Element, Element]:
    first = _element(view, at, order)
    return first, _element(view, first.end, order)


def _fields(view: memoryview, at: int, order: str) -> tuple[int, int]:
    """Where the first field's value begins, and the number of fields."""
    length, names = _two(view, at, order)
    if length.kind != INT32 or len(length.data) != 4 or names.kind != INT8:
        raise MatlabFault("a structure has no names of fields")
    size = int(_whole(length.data, order, "i4")[0])
    if not 0 < size <= LONGEST_NAME or len(names.data) % size:
        raise MatlabFault("a structure has no valid names of fields")
    texts = [bytes(names.data[k : k + size]) for k in range(0, len(names.data), size)]
    texts = [text.split(b"\0", 1)[0] for text in texts]
    if not all(text.isascii() and text.decode().isidentifier() for text in texts):
        raise MatlabFault("a structure has no valid names of fields")
    if len(set(texts)) < len(texts):
        raise MatlabFault("a structure has a field twice")
    return names.end, len(texts)


def _check_parts(view: memoryview, at: int, count: int, order: str, depth: int) -> None:
    if count > len(view) // 8:
        raise MatlabFault("an array has fewer elements than it says")
    for _ in range(count):
        part = _element(view, at, order)
        if part.kind != MATRIX:
            raise MatlabFault("an element of a structure is not an array")
        _check_array(part.data, order, depth + 1)
        at = part.end


def _check_numbers(view: memoryview, at: int, count: int, text: bool, order: str) -> int:
    numbers = _element(view, at, order)
    width = WIDTHS.get(numbers.kind)
    if width is None or len(numbers.data) % width:
        raise MatlabFault("an array does not have a type of numbers")
    held = len(numbers.data) // width
    if held != count or (numbers.kind in (UTF8, 17, 18) and not text):
        raise MatlabFault(f"an array has {held} numbers but declares {count}")
    if text:
        bytes(numbers.data).decode(
            {UTF8: "utf-8", 17: "utf-16", 18: "utf-32"}.get(numbers.kind, "latin-1")
        )
    return numbers.end


def _whole(data: Any, order: str, kind: str) -> np.ndarray:
    try:
        return np.frombuffer(data, np.dtype(order + kind))
    except ValueError as error:
        raise MatlabFault("an element has a wrong length") from error
