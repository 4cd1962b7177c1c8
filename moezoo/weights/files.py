"""Arrays in files of other projects, by name; whatever is wrong with a file is one sentence.

Shapes and types are known before an array is decoded, so that what does not fit costs nothing.

Written are folders of several files, which appear whole under their name, or not at all
(`written_whole`).
"""

from __future__ import annotations

import math
import shutil
import struct
import tokenize
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import ml_dtypes
import numpy as np

from moezoo import regular, storage
from moezoo.errors import UserError
from moezoo.files import failure
from moezoo.schema_check import FormatFault, first_line, shortened
from moezoo.weights.archive import check_parts
from moezoo.weights.tensor_file import TYPES, TensorFile, entries
from moezoo.weights.torch_file import TorchFile, kind

F = TypeVar("F")
Arrays = dict[str, np.ndarray]
DAMAGED = (
    ValueError, EOFError, KeyError, TypeError, IndexError, OverflowError, SyntaxError, RuntimeError,
    MemoryError, zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
)  # fmt: skip


class StoredArray(NamedTuple):
    """What a file says of an array before it is read; `dtype` None: of a type not read here."""

    shape: tuple[int, ...]
    dtype: np.dtype | None


class OpenWeights(Protocol):
    """An open file: its arrays by name, decoded one by one.

    note: what was chosen of it, in words; "" where there was no choice.
    """

    path: Path
    note: str

    @property
    def stored(self) -> Mapping[str, StoredArray]:
        """Every array's shape and type."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One array, floats of the file's type; UserError for another type and for damage."""
        ...


class Npz:
    """An .npz file of NumPy."""

    note = ""

    def __init__(self, path: Path):
        self.path = path
        self.stored: dict[str, StoredArray] = {}
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            check_parts(infos, path)
            for info in infos:
                name = info.filename.removesuffix(".npy")
                if name == info.filename or name in self.stored:
                    raise FormatFault(
                        f"it holds {shortened(repr(info.filename), 100)}, an odd or double"
                    )
                self.stored[name] = _header(archive, info)

    def read(self, name: str) -> np.ndarray:
        dtype = float_type(self.stored[name], name, self.path)
        return self.array(name).view(dtype)

    def array(self, name: str) -> np.ndarray:
        """One array of any type but objects; UserError for damage."""
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except (*DAMAGED, OSError) as error:
            raise _damaged(self.path, error) from error


class Safetensors:
    """A .safetensors file."""

    note = ""

    def __init__(self, path: Path):
        self.path = path
        self._file = TensorFile(path, entries(path))
        self.stored = {name: stored(self._file, name) for name in self._file.entries}

    def read(self, name: str) -> np.ndarray:
        return self._file.read(name, np.array)


class Checkpoint:
    """A checkpoint of PyTorch, of which nothing is executed."""

    def __init__(self, path: Path):
        self.path = path
        self._file = TorchFile(path)
        self.note = self._file.note
        self.stored = {
            name: StoredArray(view.shape, kind(view)) for name, view in self._file.entries.items()
        }

    def read(self, name: str) -> np.ndarray:
        float_type(self.stored[name], name, self.path)
        try:
            return self._file.read(name)
        except (*DAMAGED, OSError) as error:
            raise _damaged(self.path, error) from error


class Index:
    """A checkpoint of the published V-MoE code, by its .index file."""

    note = ""

    def __init__(self, path: Path):
        self.path = path
        from moezoo.weights.vmoe_file import VMoECheckpoint  # msgpack is for these alone

        self._file = VMoECheckpoint(path)
        self.stored = {n: StoredArray(i.shape, i.dtype) for n, i in self._file.infos.items()}

    def read(self, name: str) -> np.ndarray:
        float_type(self.stored[name], name, self.path)
        try:
            return self._file.read(name)
        except (*DAMAGED, OSError) as error:
            raise _damaged(self.path, error) from error


FORMATS: dict[str, Callable[[Path], OpenWeights]] = {
    ".npz": Npz,
    ".safetensors": Safetensors,
    ".pth": Checkpoint,
    ".pt": Checkpoint,
    ".bin": Checkpoint,
    ".index": Index,
}


def open_npz(path: Path) -> Npz:
    """An .npz file; raises UserError as `open_file`."""
    return _opened(path, Npz)


def open_file(path: Path) -> OpenWeights:
    """The arrays of a file of one of the `FORMATS`.

    Raises UserError for a missing file, another format, a damaged file, and for an archive that
    would grow out of all proportion.
    """
    if path.suffix not in FORMATS:
        raise UserError(
            f"'{path}' is no file of weights that can be read here: name an .npz file "
            "(augreg), a .safetensors file (timm, DeiT), a checkpoint of PyTorch (.pth) or of "
            "V-MoE's published code (.index)."
        )
    return _opened(path, FORMATS[path.suffix])


def _opened(path: Path, form: Callable[[Path], F]) -> F:
    if not path.exists():
        raise UserError(f"There is no file '{path}': name a file of weights.")
    regular.check(path, 2**62, UserError, "name a file of weights")
    try:
        return form(path)
    except OSError as error:
        raise UserError(f"Cannot read '{path}': {error.strerror or 'it is damaged'}.") from error
    except DAMAGED as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(
        f"'{path}' cannot be read as {path.suffix} ({first_line(error)}): it is damaged or another "
        "kind of file; download it again."
    )


def _header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise FormatFault(f"{shortened(info.filename, 100)} is of version {version}")
        shape, _, dtype = HEADERS[version](file)
        left = info.file_size - file.tell()
    if any(isinstance(n, bool) or n < 0 for n in shape) or dtype.hasobject or not dtype.itemsize:
        raise FormatFault(f"{shortened(info.filename, 100)} is {dtype} of {shape}")
    if math.prod(shape) * dtype.itemsize != left:
        raise FormatFault(
            f"{shortened(info.filename, 100)} has {left} bytes for {dtype} of {shape}"
        )
    return StoredArray(shape, dtype)


HEADERS: dict[Any, Callable[[Any], tuple[Any, bool, np.dtype]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def float_type(array: StoredArray, name: str, path: Path) -> np.dtype:
    """The type of an array of floats; UserError for others.

    bfloat16, which NumPy writes as two bytes of nothing in particular, is what it was.
    """
    dtype = array.dtype
    if dtype is not None and dtype.kind == "V" and dtype.itemsize == 2 and not dtype.names:
        return np.dtype(ml_dtypes.bfloat16)
    if dtype == ml_dtypes.bfloat16:
        return np.dtype(ml_dtypes.bfloat16)
    if dtype is None or dtype.kind != "f":
        but = "" if dtype is None else f" but {dtype}"
        raise UserError(
            f"{shortened(name, 100)} in '{path}' holds no floats{but}: take another file."
        )
    return dtype


def finite(weights: OpenWeights, name: str) -> np.ndarray:
    """One array, float32; UserError also for values that are not finite."""
    with np.errstate(over="ignore"):  # of float64, which then is not finite
        array = np.asarray(weights.read(name), np.float32)
    if not np.isfinite(array).all():
        raise UserError(
            f"{shortened(name, 200)} in '{weights.path}' has values that are not finite: it is "
            "damaged; download it again."
        )
    return array


def stored(file: TensorFile, name: str) -> StoredArray:
    """An array of a safetensors file."""
    entry = file.entries[name]
    return StoredArray(entry.shape, TYPES.get(entry.kind))


def check_new(folder: Path) -> None:
    """UserError where the folder is there already."""
    if storage.is_stored(folder) and storage.free(folder):
        return
    # A link that leads nowhere is no folder, but its name is taken.
    if folder.exists() or (not storage.is_stored(folder) and folder.is_symlink()):
        raise UserError(f"{folder} exists already; choose another folder.")


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, which takes its name when the block ends well.

    Whatever ends the block otherwise, nothing stays. Raises UserError where `folder` exists or the
    disk does not take it.
    """
    check_new(folder)
    if storage.is_stored(folder):
        try:
            with storage.written(folder) as temporary:
                yield temporary
        except OSError as error:
            raise failure("write", folder, error) from error
        return
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        raise failure("write", folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
