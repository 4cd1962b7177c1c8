"""Rows of a safetensors file's arrays, each read by its byte range when its turn comes.

A row is what an array has at one index of its first axis: of stacked experts, one expert. Bytes go
straight into memory that is there already. The file is not mapped: where a mapped file is cut short
by somebody else, the process that looks at it is killed, while a read just ends early.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moezoo.errors import UserError
from moezoo.schema_check import shortened
from moezoo.tensor_header import TensorEntry
from moezoo.weights.tensor_file import AGAIN, TYPES, TensorFile


class RowForm(NamedTuple):
    """What one row of a stored array looks like."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def bytes(self) -> int:
        """Of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class RowFile:
    """An open file of weights, for one thread at a time.

    Raises UserError where it is missing, truncated or no safetensors file, and while it is read,
    where somebody changed it since it was opened.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.tensors = TensorFile(self.path)
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115  (open as long as this)
            self._stamp = self._stamped()
        except OSError as error:
            raise UserError(f"Could not read {self.path}: {error.strerror}.") from error
        # Between reading the header and opening it again the file may have become another one.
        if TensorFile(self.path).entries != self.tensors.entries:
            raise self._changed()

    def entry(self, name: str) -> TensorEntry:
        """An array; UserError where the file has none of this name, or no floats in it."""
        if name not in self.tensors.entries:
            raise UserError(f"{self.path} is of another model: it has no {shortened(name, 200)}.")
        self.tensors.check_type(name)
        return self.tensors.entries[name]

    def form(self, name: str) -> RowForm:
        """Shape and type of a row of an array; UserError as `entry`."""
        entry = self.entry(name)
        return RowForm(entry.shape[1:], TYPES[entry.kind])

    def read(self, name: str, row: int, out: np.ndarray) -> None:
        """Fill `out`, contiguous and of the row's `form`, with one row of an array."""
        entry, size = self.entry(name), out.nbytes
        left = out.reshape(-1).view(np.uint8).data
        try:
            self._file.seek(entry.start + row * size)
            while left:
                got = self._file.readinto(left)
                if not got:
                    raise self._changed()
                left = left[got:]
        except OSError as error:
            raise UserError(f"Could not read {self.path}: {error.strerror}.") from error
        # Afterwards: what was read before a change is whole.
        self.check_unchanged()

    def check_unchanged(self) -> None:
        """UserError where the file is not as it was when it was opened."""
        if self._stamped() != self._stamp:
            raise self._changed()

    def close(self) -> None:
        """Nothing can be read afterwards."""
        self._file.close()

    def _stamped(self) -> tuple[int, int]:
        # Of the open file: one that takes its place under the same name is none of ours.
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _changed(self) -> UserError:
        return UserError(
            f"{self.path} was changed while a model was reading it: {AGAIN}, and load it anew."
        )
