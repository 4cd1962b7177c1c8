"""Checkpoints of PyTorch written by hand, step by step, without PyTorch and without pickling."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moezoo.weights.torch_file import MAGIC, VERSION

KINDS = {
    "float32": "Float", "float16": "Half", "float64": "Double", "bfloat16": "BFloat16",
    "int64": "Long", "uint8": "Byte",
}  # fmt: skip
PROTO, STOP = b"\x80\x02", b"."
EMPTY = b"ccollections\nOrderedDict\n)R"


def text(value: str) -> bytes:
    """The step that puts a text on the stack."""
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + len(content).to_bytes(4, "little") + content


def number(value: int) -> bytes:
    """The step that puts a whole number on the stack."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def table(entries: Mapping[str, bytes]) -> bytes:
    """A dictionary whose values are made by these steps."""
    return b"}(" + b"".join(text(name) + made for name, made in entries.items()) + b"u"


def storage(key: str, kind: str, count: int) -> bytes:
    named = b"ctorch\n" + kind.encode() + b"Storage\n"
    return b"(" + text("storage") + named + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(
    key: str,
    shape: Sequence[int],
    strides: Sequence[int] | None = None,
    offset: int = 0,
    count: int | None = None,
    kind: str = "Float",
) -> bytes:
    """The steps that make an array; strides and count are those of a contiguous one."""
    if strides is None:
        strides = [int(np.prod(shape[i + 1 :], dtype=object)) for i in range(len(shape))]
    count = int(np.prod(shape, dtype=object)) if count is None else count
    given = storage(key, kind, count) + number(offset) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + given + b"\x89" + EMPTY + b"tR"


def archive(
    path: Path,
    made: bytes,
    storages: Mapping[str, bytes],
    method: int = zipfile.ZIP_STORED,
    more: Mapping[str, bytes] | None = None,
) -> Path:
    """A checkpoint whose value is made by these steps."""
    members = {"data.pkl": PROTO + made + STOP, "byteorder": b"little", "version": b"3\n"}
    members |= {f"data/{key}": content for key, content in storages.items()}
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in {**members, **(more or {})}.items():
            file.writestr(f"archive/{name}", content)
    return path


def write(path: Path, arrays: Mapping[str, np.ndarray], entry: str = "", prefix: str = "") -> Path:
    """A checkpoint of these arrays: under one entry beside others, with something before names."""
    made, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        made[prefix + name] = tensor(str(i), array.shape, kind=KINDS[array.dtype.name])
        storages[str(i)] = array.tobytes()
    value = table(made)
    if entry:
        value = table({"epoch": number(3), entry: value, "optimizer": table({})})
    return archive(path, value, storages)


def row(made: bytes, keys: object, behind: bytes, little: bool = True) -> bytes:
    """A checkpoint as PyTorch before 1.6 wrote it: pickles, then the storages."""
    head = [MAGIC, VERSION, {"little_endian": little}]
    first = b"".join(pickle.dumps(one, 2) for one in head)
    return first + PROTO + made + STOP + pickle.dumps(keys, 2) + behind


def in_a_row(arrays: Mapping[str, np.ndarray]) -> bytes:
    """These arrays as such a checkpoint."""
    made = {
        name: tensor(str(i), array.shape, kind=KINDS[array.dtype.name])
        for i, (name, array) in enumerate(arrays.items())
    }
    behind = [array.size.to_bytes(8, "little") + array.tobytes() for array in arrays.values()]
    return row(table(made), [str(i) for i in range(len(arrays))], b"".join(behind))
