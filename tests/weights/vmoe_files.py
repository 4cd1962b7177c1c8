"""Checkpoints in the published V-MoE code's form, written piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from moezoo.weights.vmoe_file import MARKER, VERSION

pack = msgpack.packb
Pieces = list[tuple[tuple[slice, ...], int]]  # where, and in which data file


def extension(code: int, value: Any) -> msgpack.ExtType:
    return msgpack.ExtType(code, pack(value))


def sliced(part: tuple[slice, ...]) -> list[bytes]:
    return [pack([one.start, one.stop, None]) for one in part]


def array(a: np.ndarray) -> msgpack.ExtType:
    return extension(1, [list(a.shape), a.dtype.name, a.tobytes()])


def info(a: np.ndarray, pieces: Pieces) -> msgpack.ExtType:
    parts = [pack(sliced(part)) for part, _ in pieces]
    record = pack([list(a.shape), a.dtype.name, False, {}])
    return extension(8, [record, parts, [shard for _, shard in pieces]])


def tree_of(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        inside = tree
        for folder in folders:
            inside = inside.setdefault(folder, {})
        inside[leaf] = value
    return tree


def write(
    folder: Path, arrays: Mapping[str, np.ndarray], pieces: Mapping[str, Pieces], stem: str = "m"
) -> Path:
    """An index and two data files; every piece in chunks of at most five numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    index = tree_of({name: info(a, pieces[name]) for name, a in arrays.items()})
    whole = {"shard_count": 2, "index": index, "version": VERSION}
    (folder / f"{stem}.index").write_bytes(pack(whole))
    # Trees are flattened level by level in the alphabet's order, as paths of tuples sort.
    order = sorted(arrays, key=lambda name: name.split("/"))
    for shard in range(2):
        held: dict[str, Any] = {MARKER: True}
        for number, name in enumerate(order):
            own = []
            for part, where in pieces[name]:
                flat = arrays[name][part].reshape(-1)
                chunks = [array(flat[i : i + 5]) for i in range(0, max(flat.size, 1), 5)]
                if where == shard:
                    own.append([chunks, extension(6, sliced(part))])
            if own:
                held[str(number)] = own
        (folder / f"{stem}.data-{shard:05}-of-00002").write_bytes(pack(held))
    return folder / f"{stem}.index"


def halves(a: np.ndarray) -> Pieces:
    """Rows of the first half in the second file, the others in the first."""
    rest, cut = tuple(slice(0, n) for n in a.shape[1:]), a.shape[0] // 2
    return [((slice(0, cut), *rest), 1), ((slice(cut, a.shape[0]), *rest), 0)]
