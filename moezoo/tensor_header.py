"""The header of a safetensors file, checked as a whole before a byte of its arrays is read.

Eight bytes of header length, a JSON object, then the arrays: one behind the other, without gaps
and without sharing a byte, up to the end of the file. Whatever is else is refused, because a
wrong offset makes weights of other bytes.

Imports nothing of the package but `schema_check`: a copy of both travels in exports.
"""

from __future__ import annotations

import math
from typing import BinaryIO, NamedTuple

if __package__:
    from moezoo import schema_check as sc
else:
    import schema_check as sc  # pyright: ignore[reportMissingImports]

LONGEST = 100_000_000  # bytes of a header, as the format's own library
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2}
BYTES |= {"BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8}
FIELDS = ("dtype", "shape", "data_offsets")
ARRAY = sc.table(
    {
        "dtype": sc.one_of(*BYTES),
        "shape": sc.list_of(sc.whole(0, 2**48), 0, 32),
        "data_offsets": sc.list_of(sc.whole(0, 2**62), 2, 2),
    },
    required=FIELDS,
    others=sc.refused,
)
FORM = sc.table({"__metadata__": sc.map_of(sc.anything)}, others=ARRAY)


class TensorEntry(NamedTuple):
    """One array: its type's name, its shape, and the file's bytes from `start` up to `end`."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


def read(file: BinaryIO, size: int) -> dict[str, TensorEntry]:
    """The arrays by name in a file of `size` bytes that is read from its beginning.

    Raises `schema_check.FormatFault` for a file that is not safetensors, is truncated, or is longer
    than its header says.
    """
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or not 2 <= length <= size - 8:
        raise sc.FormatFault(f"it has {size:,} bytes and tells of a header of {length:,}")
    if length > LONGEST:
        raise sc.FormatFault(f"its header has {length:,} bytes, at most {LONGEST:,} are read")
    header = sc.parse(file.read(length))
    FORM(header, "")
    header.pop("__metadata__", None)
    found = {
        name: TensorEntry(
            array["dtype"],
            tuple(array["shape"]),
            *(8 + length + offset for offset in array["data_offsets"]),
        )
        for name, array in header.items()
    }
    _check_places(found, 8 + length, size)
    return found


def _check_places(found: dict[str, TensorEntry], first: int, size: int) -> None:
    """Every array has the bytes of its shape, and together they are the rest of the file."""
    at = first
    # The ends count, too: an empty array may begin where another one does.
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        wanted = BYTES[entry.kind] * math.prod(entry.shape)
        if entry.end - entry.start != wanted:
            raise sc.FormatFault(
                f"{sc.shown(name)} has {entry.end - entry.start:,} bytes instead of {wanted:,}"
            )
        if entry.start != at:
            how = "shares bytes with another array" if entry.start < at else "lies behind a gap"
            raise sc.FormatFault(f"{sc.shown(name)} {how}")
        at = entry.end
    if at != size:
        raise sc.FormatFault(f"its arrays end at byte {at:,}, the file has {size:,}")
