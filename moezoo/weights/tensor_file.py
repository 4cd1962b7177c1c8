"""Safetensors files: reading parts of single arrays, and writing without a second copy.

A file is eight bytes of header length, a JSON header and the arrays' bytes. Ours are read and
written here instead of through the `safetensors` package, whose NumPy side does not give slices of
bfloat16 and writes a file only from all of its arrays at once.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moezoo.errors import UserError

TYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
BLOCK = 256
AGAIN = "download or write it again"


class Entry(NamedTuple):
    """One array of a file: its type's name, its shape and its first and last byte."""

    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """The arrays of one file, by name; nothing but the header is read before it is asked for.

    Raises UserError where the file is missing, truncated or no safetensors file.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.entries = _entries(self.path)

    def read(self, name: str, take: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What `take` makes of the array, which is a view of the file that only lives meanwhile.

        Only the pages that `take` looks at are read; it must return a copy.
        Raises UserError for a type that is not a float.
        """
        entry = self.entries[name]
        if entry.kind not in TYPES:
            raise UserError(
                f"{name} in {self.path} has type {entry.kind}; only {', '.join(TYPES)} can be read."
            )
        if entry.start == entry.end:
            return take(np.zeros(entry.shape, TYPES[entry.kind]))
        # A mapping of its own for every read: closing it gives its pages back at once.
        first = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        size = entry.end - first
        with (
            open(self.path, "rb") as file,
            mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=first) as mapped,
        ):
            flat = np.frombuffer(mapped, TYPES[entry.kind], offset=entry.start - first)
            taken = take(flat.reshape(entry.shape))
            del flat
            return taken


def copied(view: np.ndarray, dtype: Any) -> np.ndarray:
    """A contiguous copy in another type."""
    if view.ndim != 2 or view.flags.c_contiguous:
        return np.array(view, dtype, order="C")
    # A transposed matrix goes block by block: row by row its every element would miss the cache.
    out = np.empty(view.shape, dtype)
    for i in range(0, view.shape[0], BLOCK):
        for j in range(0, view.shape[1], BLOCK):
            part = np.s_[i : i + BLOCK, j : j + BLOCK]
            out[part] = view[part]
    return out


def _entries(path: Path) -> dict[str, Entry]:
    try:
        total = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= total - 8:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        entries = {name: _entry(value, 8 + length) for name, value in header.items()}
        for name, entry in entries.items():
            if entry.end > total:
                raise ValueError(f"{name} ends at byte {entry.end} of {total}")
            if entry.kind in TYPES:
                size = TYPES[entry.kind].itemsize * int(np.prod(entry.shape, dtype=np.int64))
                if not 0 <= entry.start <= entry.end or size != entry.end - entry.start:
                    raise ValueError(
                        f"{name} has {entry.end - entry.start} bytes instead of {size}"
                    )
        return entries
    except FileNotFoundError as error:
        raise UserError(f"There is no {path}; {AGAIN}.") from error
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); {AGAIN}."
        ) from error


def _entry(value: Mapping[str, Any], base: int) -> Entry:
    start, end = value["data_offsets"]
    return Entry(value["dtype"], tuple(value["shape"]), base + start, base + end)


class Planned(NamedTuple):
    """An array to write: its shape and type, and a function that brings it when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    bring: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write(path: Path, arrays: Mapping[str, Planned]) -> None:
    """One file of these arrays, one of them in memory at a time; OSError where the disk fails."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in arrays.items():
        end = start + array.size
        header[name] = {
            "dtype": NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at a multiple of eight bytes
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array.bring()).reshape(-1).view(np.uint8).data)
