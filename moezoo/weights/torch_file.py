"""Checkpoints of PyTorch (.pth, .pt, .bin): a pickle that is not run, and storages beside it.

Since PyTorch 1.6 a checkpoint is a zip archive: `NAME/data.pkl` tells names, shapes, strides and
which storage an array lies in, `NAME/data/KEY` holds a storage's bytes. Before, and with
`_use_new_zipfile_serialization=False`, it is a row of pickles with the storages behind. The names
are known without reading a storage; arrays are decoded one by one, and nothing of a checkpoint is
ever executed (`pickled`).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from moezoo import regular
from moezoo.errors import UserError
from moezoo.schema_check import FormatFault, shortened, shown
from moezoo.weights import pickled
from moezoo.weights.archive import MOST_ARRAYS, check_growth, check_parts
from moezoo.weights.pickled import Refused, StorageRef, StorageView

TYPES: dict[str, np.dtype] = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
}
MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001  # of the row of pickles
MOST_PICKLE = 32 * regular.MB
MOST_AXES = 32
# Entries under which programs keep them; DeepSpeed's is "module".
WEIGHTS = ("state_dict", "model", "module", "model_state_dict")
PARALLEL = "module."  # in front of all names where the model was trained on several devices


class TorchFile:
    """The arrays of a checkpoint by name; their bytes are not read before they are asked for.

    note: what was chosen of the checkpoint, in words; "" where there was no choice.
    Raises UserError for a checkpoint that asks for more than weights need; FormatFault, ValueError
    or what zipfile raises where it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            value, self._storages = _packed(path) if _is_zip(path) else _in_a_row(path)
        except Refused as asked:
            raise UserError(
                f"'{path}' {asked}: nothing of it was run; take another file, or where it was made "
                "save only the model's state_dict()."
            ) from asked
        self.entries, self.note = _named(value)
        for name, view in self.entries.items():
            _check(name, view, self._storages)
        grown = sum(math.prod(v.shape) * kind(v).itemsize for v in self.entries.values())
        check_growth(grown, path)

    def read(self, name: str) -> np.ndarray:
        """One array, contiguous and of the file's type; raises as the opening for damage."""
        view = self.entries[name]
        dtype = kind(view)
        if not math.prod(view.shape):
            return np.zeros(view.shape, dtype)
        first, last = view.offset * dtype.itemsize, _end(view) * dtype.itemsize
        content = self._storages.read(view.storage.key, first, last - first)
        if len(content) != last - first:
            raise FormatFault(f"storage {shown(view.storage.key)} ends early")
        along = zip(view.shape, view.strides, strict=True)
        steps = [step * dtype.itemsize if n > 1 else 0 for n, step in along]
        return np.array(np.ndarray(view.shape, dtype, content, strides=steps), order="C")


def kind(view: StorageView) -> np.dtype:
    """The type of an array's elements."""
    return TYPES[view.storage.kind]


class Storages(Protocol):
    """Where the bytes of storages are."""

    def size(self, key: str) -> int | None:
        """Bytes of a storage; None where there is none of this key."""
        ...

    def read(self, key: str, start: int, count: int) -> bytes:
        """Bytes of a storage from `start` on; fewer where it ends."""
        ...


class _Members:
    """Storages as members of a zip archive."""

    def __init__(self, path: Path, folder: str, infos: Mapping[str, zipfile.ZipInfo]):
        self._path, self._folder, self._infos = path, folder, infos

    def size(self, key: str) -> int | None:
        info = self._infos.get(f"{self._folder}/data/{key}")
        return None if info is None else info.file_size

    def read(self, key: str, start: int, count: int) -> bytes:
        info = self._infos[f"{self._folder}/data/{key}"]
        with zipfile.ZipFile(self._path) as archive, archive.open(info) as file:
            file.seek(start)  # from 0 to the end, which is usual, the sum of the bytes is checked
            return file.read(count)


class _Places(NamedTuple):
    """Storages as stretches of a file: first byte and length by key."""

    path: Path
    stretches: Mapping[str, tuple[int, int]]

    def size(self, key: str) -> int | None:
        return self.stretches[key][1] if key in self.stretches else None

    def read(self, key: str, start: int, count: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.stretches[key][0] + start)
            return file.read(count)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _packed(path: Path) -> tuple[Any, Storages]:
    """The pickled value and the storages of an archive."""
    with zipfile.ZipFile(path) as archive:
        infos: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            if info.filename in infos:
                raise FormatFault(f"it has {shortened(ascii(info.filename), 100)} twice")
            infos[info.filename] = info
        check_parts(list(infos.values()), path)
        folders = [name.removesuffix("/data.pkl") for name in infos if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise FormatFault(f"it has {len(folders)} parts data.pkl, where a checkpoint has one")
        folder = folders[0]
        if f"{folder}/constants.pkl" in infos:
            raise Refused("is a program of TorchScript, of which no weights are read")
        order = infos.get(f"{folder}/byteorder")
        if order is not None and archive.open(order).read(10) != b"little":
            raise Refused("was written on a big-endian machine, whose numbers are not read")
        size = infos[f"{folder}/data.pkl"].file_size
        if size > MOST_PICKLE:
            raise FormatFault(f"its data.pkl has {size / 1e6:,.0f} MB")
        value, _ = pickled.read(archive.read(f"{folder}/data.pkl"))
    return value, _Members(path, folder, infos)


def _in_a_row(path: Path) -> tuple[Any, Storages]:
    """The pickled value and the storages of a file from before PyTorch 1.6."""
    with open(path, "rb") as file:
        content = file.read(MOST_PICKLE)
    if content[257:262] == b"ustar":
        raise Refused("is a tar archive, as PyTorch before 0.1.10 wrote, which is not read")
    magic, at = pickled.read(content)
    if magic != MAGIC:
        raise FormatFault("it is neither a zip archive nor marked as a checkpoint")
    version, at = pickled.read(content, at)
    if version != VERSION:
        raise FormatFault(f"it is of version {shown(version)}")
    system, at = pickled.read(content, at)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise Refused("was written on a big-endian machine, whose numbers are not read")
    refs: dict[str, StorageRef] = {}
    value, at = pickled.read(content, at, refs)
    keys, at = pickled.read(content, at)
    if not isinstance(keys, list):
        raise FormatFault("it does not tell the order of its storages")
    return value, _Places(path, _stretches(path, at, keys, refs))


def _stretches(
    path: Path, at: int, keys: list[Any], refs: Mapping[str, StorageRef]
) -> dict[str, tuple[int, int]]:
    """Where the storages lie that follow the pickles, each behind the number of its elements."""
    found: dict[str, tuple[int, int]] = {}
    total = path.stat().st_size
    with open(path, "rb") as file:
        for key in keys:
            if not isinstance(key, str) or key in found or key not in refs:
                raise FormatFault(f"its storage {shown(key)} is double, or of no array")
            file.seek(at)
            count = int.from_bytes(file.read(8), "little", signed=True)
            size = count * TYPES[refs[key].kind].itemsize
            if count < 0 or at + 8 + size > total:
                raise FormatFault(f"storage {shown(key)} ends early")
            found[key] = (at + 8, size)
            at += 8 + size
    return found


def _named(value: Any) -> tuple[dict[str, StorageView], str]:
    """The arrays of a checkpoint by name, and what was chosen of it."""
    if isinstance(value, StorageView):
        raise FormatFault("it is a single array without a name")
    if not isinstance(value, dict):
        raise FormatFault(f"it is a {type(value).__name__}, no table of arrays")
    told: list[str] = []
    entry = next((name for name in WEIGHTS if isinstance(value.get(name), dict)), None)
    if entry is not None:
        told.append(f"read from its entry '{entry}'")
        value = value[entry]
    found = {name: one for name, one in value.items() if isinstance(one, StorageView)}
    for name, one in value.items():
        if not isinstance(name, str):
            raise FormatFault(f"it has an entry {shown(name)}, which is no name")
        if isinstance(one, dict) and any(isinstance(inner, StorageView) for inner in one.values()):
            raise FormatFault(
                f"its arrays lie in an entry {shown(name)}, which is none of {', '.join(WEIGHTS)}"
            )
    if not found:
        there = ", ".join(shown(name) for name in list(value)[:4]) or "nothing"
        raise FormatFault(f"it holds no arrays, but {there}")
    if len(found) > MOST_ARRAYS:
        raise FormatFault(f"it has {len(found):,} arrays")
    if all(name.startswith(PARALLEL) for name in found):
        found = {name.removeprefix(PARALLEL): one for name, one in found.items()}
        told.append(f"without the '{PARALLEL}' in front of every name")
    return found, ", ".join(told)


def _check(name: str, view: StorageView, storages: Storages) -> None:
    """FormatFault where an array is not inside its storage, or the storage not in the file."""
    name = shortened(name if name.isprintable() else ascii(name), 100)
    key, count = view.storage.key, view.storage.count
    axes = len(view.shape)
    if axes != len(view.strides) or axes > MOST_AXES:
        raise FormatFault(f"{name} has {axes} axes and {len(view.strides)} strides")
    if min((view.offset, *view.shape, *view.strides)) < 0:
        raise FormatFault(
            f"{name} has shape {shown(view.shape)}, strides {shown(view.strides)} and offset "
            f"{shown(view.offset)}, none of which may be negative"
        )
    size, wanted = storages.size(key), count * kind(view).itemsize
    if size is None:
        raise FormatFault(f"{name} lies in storage {shown(key)}, which is not there")
    if size < wanted:
        raise FormatFault(f"{name} lies in a storage of {wanted} bytes, which has {size}")
    if math.prod(view.shape) > count or _end(view) > count:
        raise FormatFault(
            f"{name} has shape {shown(view.shape)}, strides {shown(view.strides)} and offset "
            f"{shown(view.offset)}, which reach beyond the {count} elements of its storage"
        )


def _end(view: StorageView) -> int:
    """The element behind the last one of an array."""
    if not math.prod(view.shape):
        return 0
    steps = zip(view.shape, view.strides, strict=True)
    return view.offset + sum((n - 1) * step for n, step in steps) + 1
