"""Checkpoints of the published V-MoE code: `NAME.index` beside `NAME.data-00000-of-00002` etc.

All are msgpack. The index is a tree of names with every array's shape, type and pieces; a data
file holds pieces by the array's number in that tree, in the alphabet's order. What stands where in
a data file is looked up once; pieces are decoded when their array is read. Nothing in such a file
is executed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import msgpack
import numpy as np

from moezoo import regular
from moezoo.errors import UserError
from moezoo.schema_check import FormatFault, first_line, shortened

VERSION = "20220622"
MARKER = "__msgpack_array_chunk_a87ca2__"
ARRAY, SLICE, SLICES, INFO = 1, 5, 6, 8  # kinds of extension
LARGEST_INDEX = 1 << 26  # bytes; that of the largest published model has thousands
LARGEST_CHUNK = 1 << 30  # bytes; the code that writes them cuts at 256 MB
Part = tuple[slice, ...]
T = TypeVar("T")


class _Info(NamedTuple):
    """Of an array: where its pieces go, and the number of the data file of each."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    parts: list[Part]
    shards: list[int]


def _unpacked(data: bytes) -> Any:
    """A value inside an extension; extensions inside it are decoded as well."""
    return msgpack.unpackb(data, ext_hook=_extension, strict_map_key=False)


def _extension(code: int, data: bytes) -> Any:
    if code == ARRAY:
        shape, name, content = _unpacked(data)
        dtype = _type(name)
        if dtype is None:
            raise FormatFault(f"it holds an array of type {shortened(str(name), 50)}")
        return np.frombuffer(content, dtype).reshape(_shape(shape))
    if code == SLICES:
        return tuple(_slice(piece) for piece in _unpacked(data))
    if code == INFO:
        record, parts, shards = _unpacked(data)
        shape, name, *_ = _unpacked(record)
        found = [tuple(_slice(piece) for piece in _unpacked(part)) for part in parts]
        return _Info(_shape(shape), _type(name), found, [int(n) for n in shards])
    raise FormatFault(f"it holds an extension of kind {code}")


def _slice(data: bytes) -> slice:
    begin, end, step = _unpacked(data)
    if step not in (None, 1) or not 0 <= begin <= end:
        raise FormatFault(f"a piece goes from {begin} to {end} in steps of {step}")
    return slice(begin, end)


def _shape(sizes: Any) -> tuple[int, ...]:
    if not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise FormatFault(f"an array has the shape {shortened(str(sizes), 50)}")
    return tuple(sizes)


def _type(name: str) -> np.dtype | None:
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(name)
    except TypeError:
        return None


def _leaves(tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, _Info]]:
    """The arrays by path, in the order of JAX's flattened trees."""
    for name in sorted(tree):
        inside, path = tree[name], f"{before}{name}"
        if isinstance(inside, Mapping):
            yield from _leaves(inside, f"{path}/")
        elif isinstance(inside, _Info):
            yield path, inside
        else:
            raise FormatFault(f"{shortened(path, 100)} is no array")


def _as_faults(of: Callable[..., T]) -> Callable[..., T]:
    """What msgpack says of damage as a FormatFault."""

    @wraps(of)
    def told(*given: Any) -> T:
        try:
            return of(*given)
        except msgpack.UnpackException as error:
            raise FormatFault(first_line(error)) from error

    return told


class VMoECheckpoint:
    """A checkpoint, by its index; raises FormatFault for damage, UserError for a missing file."""

    @_as_faults
    def __init__(self, path: Path):
        self.path = path
        if path.stat().st_size > LARGEST_INDEX:
            raise FormatFault("an index is not so large")
        index = _unpacked(path.read_bytes())
        if not isinstance(index, Mapping) or index.get("version") != VERSION:
            found = index.get("version") if isinstance(index, Mapping) else None
            raise FormatFault(f"its version is {shortened(str(found), 50)}, not {VERSION}")
        self._count = int(index["shard_count"])
        leaves = dict(_leaves(index["index"]))
        self._numbers = {name: str(number) for number, name in enumerate(leaves)}
        self.infos = {name: _whole(name, info) for name, info in leaves.items()}
        self._places = [self._scan(shard) for shard in range(self._count)]

    def _file(self, shard: int) -> Path:
        return self.path.with_suffix(f".data-{shard:05}-of-{self._count:05}")

    def _scan(self, shard: int) -> dict[str, int]:
        """Where in a data file the pieces of each array begin."""
        file = self._file(shard)
        if not file.exists():
            raise UserError(f"'{self.path}' needs {file.name} beside it, which is not there.")
        regular.check(file, 2**62, UserError, "name a file of weights")
        places: dict[str, int] = {}
        with file.open("rb") as stream:
            reader = msgpack.Unpacker(stream, max_buffer_size=LARGEST_CHUNK)
            for _ in range(reader.read_map_header()):
                key = reader.unpack()
                if key != MARKER:
                    places[str(key)] = reader.tell()
                reader.skip()
        return places

    @_as_faults
    def read(self, name: str) -> np.ndarray:
        """One array of the index."""
        info = self.infos[name]
        made = np.empty(info.shape, info.dtype)
        written = 0
        for shard in sorted(set(info.shards)):
            for chunks, part in self._pieces(shard, self._numbers[name]):
                place = made[part]
                flat = np.concatenate([np.asarray(chunk).reshape(-1) for chunk in chunks])
                if part not in info.parts or flat.size != place.size or flat.dtype != info.dtype:
                    raise FormatFault(f"a piece of {shortened(name, 100)} is not that of the index")
                made[part] = flat.reshape(place.shape)
                written += flat.size
        if written != made.size:
            raise FormatFault(f"{shortened(name, 100)} has {written} of {made.size} numbers")
        return made

    def _pieces(self, shard: int, number: str) -> Any:
        if number not in self._places[shard]:
            raise FormatFault(f"{self._file(shard).name} has no array {number}")
        with self._file(shard).open("rb") as stream:
            stream.seek(self._places[shard][number])
            reader = msgpack.Unpacker(
                stream, ext_hook=_extension, max_buffer_size=LARGEST_CHUNK, strict_map_key=False
            )
            return reader.unpack()


def _whole(name: str, info: _Info) -> _Info:
    """FormatFault where the pieces do not make the array."""
    if len(info.parts) != len(info.shards):
        raise FormatFault(f"{shortened(name, 100)} has pieces without a file")
    for part in info.parts:
        if len(part) != len(info.shape) or any(
            piece.stop > n for piece, n in zip(part, info.shape, strict=True)
        ):
            raise FormatFault(f"a piece of {shortened(name, 100)} lies outside of it")
    held = sum(math.prod(piece.stop - piece.start for piece in part) for part in info.parts)
    if held != math.prod(info.shape):
        raise FormatFault(f"the pieces of {shortened(name, 100)} are not all of it")
    return info
