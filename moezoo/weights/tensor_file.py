"""Safetensors files: reading parts of single arrays, and writing without a second copy.

A file is eight bytes of header length, a JSON header and the arrays' bytes. Ours are read and
written here instead of through the `safetensors` package, whose NumPy side does not give slices of
bfloat16 and writes a file only from all of its arrays at once.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from moezoo import regular, tensor_header
from moezoo.errors import UserError
from moezoo.schema_check import FormatFault, shortened
from moezoo.tensor_header import TensorEntry

TYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
BLOCK = 256
PAGES_FROM = 1 << 20  # bytes
# Shared with child processes otherwise; Windows has no such choice.
PRIVATE: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)
AGAIN = "download or write it again"


class TensorFile:
    """The arrays of one file, by name; nothing but the header is read before it is asked for.

    Raises UserError where the file is missing, truncated or no safetensors file.
    """

    def __init__(self, path: Path | str, known: Mapping[str, TensorEntry] | None = None):
        """known: what `entries` gave for this path, where it was called already."""
        self.path = Path(path)
        self.entries = _entries(self.path) if known is None else known

    def check_type(self, name: str) -> None:
        """UserError where the array is not one of floats that are read."""
        kind = self.entries[name].kind
        if kind not in TYPES:
            raise UserError(
                f"{shortened(name, 200)} in {self.path} has type {kind}; only {', '.join(TYPES)} "
                "can be read."
            )

    def read(self, name: str, take: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """What `take` makes of the array, which is a view of the file that only lives meanwhile.

        Only the pages that `take` looks at are read; it must return a copy.
        Raises UserError for a type that is not a float.
        """
        with self.viewed(name) as view:
            return take(view())

    @contextmanager
    def viewed(self, name: str) -> Iterator[Callable[[], np.ndarray]]:
        """A function that gives views of an array in its file; none may be kept until the end.

        Threads may read their parts at once. Raises UserError for a type that is not a float.
        """
        self.check_type(name)
        entry = self.entries[name]
        if entry.start == entry.end:
            yield lambda: np.zeros(entry.shape, TYPES[entry.kind])
            return
        # A mapping for each array: closing it gives its pages back at once.
        first = entry.start - entry.start % mmap.ALLOCATIONGRANULARITY
        size = entry.end - first
        with (
            open(self.path, "rb") as file,
            mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, offset=first) as mapped,
        ):

            def view() -> np.ndarray:
                flat = np.frombuffer(mapped, TYPES[entry.kind], offset=entry.start - first)
                return flat.reshape(entry.shape)

            yield view


def own_pages(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Room for an array, of unknown content; a large one on pages of its own.

    They go back to the system with the array. Of what `malloc` gave and got back in other sizes it
    kept a tenth of a model of 7 billion parameters.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < PAGES_FROM:
        return np.empty(shape, dtype)
    return np.frombuffer(mmap.mmap(-1, size, **PRIVATE), dtype).reshape(shape)


def copied(view: np.ndarray, dtype: Any) -> np.ndarray:
    """A contiguous copy in another type."""
    out = own_pages(view.shape, dtype)
    if view.ndim != 2 or view.flags.c_contiguous:
        out[...] = view
        return out
    # A transposed matrix goes block by block: row by row its every element would miss the cache.
    for i in range(0, view.shape[0], BLOCK):
        for j in range(0, view.shape[1], BLOCK):
            part = np.s_[i : i + BLOCK, j : j + BLOCK]
            out[part] = view[part]
    return out


def _entries(path: Path) -> dict[str, TensorEntry]:
    if not path.exists():
        raise UserError(f"There is no {path}; {AGAIN}.")
    try:
        return entries(path)
    except OSError as error:
        raise UserError(f"Could not read {path}: {error.strerror}.") from error
    except FormatFault as error:
        raise UserError(
            f"{path} is truncated or no safetensors file ({error}); {AGAIN}."
        ) from error


def entries(path: Path) -> dict[str, TensorEntry]:
    """The arrays of a file by name, from its header.

    Raises FormatFault where the file is not of this format, UserError where it is no regular file,
    OSError where it cannot be read.
    """
    total = regular.check(path, 2**62, UserError, "name a file of weights")
    with open(path, "rb") as file:
        return tensor_header.read(file, total)


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
