"""Checkpoints of M3ViT's published code that several processes wrote: `{rank}.pth` in one folder.

Each process kept some of the experts, the first of them everything else, too. Read together, the
experts of all ranks stand one behind the other, as the ranks' numbers say; whatever else a further
file holds must be what the first holds.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from moezoo.errors import UserError
from moezoo.weights import files
from moezoo.weights.files import OpenWeights, StoredArray

FILE = re.compile(r"(0|[1-9]\d{0,5})\.pth")
EXPERTS = re.compile(r"(.*\.mlp)\.experts\.(htoh4|h4toh)\.\w+")
# A layer's routers, one or one per task, choose among the experts of all ranks.
ROUTER = re.compile(r"(.*\.mlp)\.gate\.(\d+\.)?w_gate")


def is_folder(path: Path) -> bool:
    """Whether a folder has files that are called as ranks are."""
    return path.is_dir() and bool(_files(path))


def _files(path: Path) -> dict[int, Path]:
    found = {int(m[1]): file for file in path.iterdir() if (m := FILE.fullmatch(file.name))}
    return dict(sorted(found.items()))


class Ranks:
    """The files of a folder as one (`files.OpenWeights`); arrays are read when asked for.

    Raises UserError where a rank is missing, or files contradict each other.
    """

    def __init__(self, path: Path):
        self.path = path
        found = _files(path)
        missing = next(rank for rank in range(len(found) + 1) if rank not in found)
        if missing < len(found):
            raise UserError(
                f"'{path}' has {', '.join(file.name for file in found.values())}, but no "
                f"{missing}.pth: put the files of all ranks into it."
            )
        self._files: list[OpenWeights] = [files.open_file(file) for file in found.values()]
        first, *others = self._files
        self.note = first.note
        self._experts = {name for name in first.stored if EXPERTS.fullmatch(name)}
        for other in others:
            self._check_experts(other)
            self._check_rest(other)
        self.stored = {name: self._together(name) for name in first.stored}
        self._check_count()

    def read(self, name: str) -> np.ndarray:
        """One array, of all ranks where it is one of experts; raises as `files.Checkpoint`."""
        if name not in self._experts:
            return self._files[0].read(name)
        return np.concatenate([file.read(name) for file in self._files])

    def _together(self, name: str) -> StoredArray:
        one = self._files[0].stored[name]
        if name not in self._experts:
            return one
        count = sum(file.stored[name].shape[0] for file in self._files)
        return StoredArray((count, *one.shape[1:]), one.dtype)

    def _check_experts(self, other: OpenWeights) -> None:
        """UserError unless a file has experts of the same layers and sizes as the first."""
        first = self._files[0]
        theirs = {name for name in other.stored if EXPERTS.fullmatch(name)}
        for name in sorted(self._experts ^ theirs):
            there, lacks = (first, other) if name in self._experts else (other, first)
            raise UserError(
                f"'{there.path}' has experts called {name}, but '{lacks.path}' has not: the files "
                "are of different checkpoints, or one is damaged."
            )
        for name in sorted(self._experts):
            one, two = first.stored[name], other.stored[name]
            if not one.shape or (one.shape[1:], one.dtype) != (two.shape[1:], two.dtype):
                raise UserError(
                    f"{name} is {_told(one)} in '{first.path}', but {_told(two)} in "
                    f"'{other.path}': take the files of one checkpoint."
                )

    def _check_rest(self, other: OpenWeights) -> None:
        """UserError for an array of another rank that is no expert and not the first's, too."""
        first = self._files[0]
        for name, held in other.stored.items():
            if name in self._experts:
                continue
            if name not in first.stored:
                raise UserError(
                    f"'{other.path}' has {name}, which '{first.path}' has not: the first rank's "
                    "file has everything but the other ranks' experts; take its own."
                )
            if held != first.stored[name] or not _same(first, other, name):
                raise UserError(
                    f"'{first.path}' and '{other.path}' contradict each other: {name} is another "
                    "array there; take the files of one checkpoint."
                )

    def _check_count(self) -> None:
        """UserError where routers choose among more experts than there are: files are missing."""
        counts = {}
        for name in self._experts:
            named = EXPERTS.fullmatch(name)
            assert named is not None  # so they were found
            counts[named[1]] = self.stored[name].shape[0]
        for name, held in self.stored.items():
            named = ROUTER.fullmatch(name)
            if named is None or named[1] not in counts or len(held.shape) != 2:
                continue
            if held.shape[1] != counts[named[1]]:
                ranks = len(self._files)
                raise UserError(
                    f"'{self.path}' has {counts[named[1]]} experts in its {ranks} files, but "
                    f"{name} chooses among {held.shape[1]}: put the files of all ranks of one "
                    f"checkpoint into it ({ranks}.pth would be the next)."
                )


def _told(held: StoredArray) -> str:
    return f"{list(held.shape)} {held.dtype}"


def _same(first: OpenWeights, other: OpenWeights, name: str) -> bool:
    """Whether an array of floats has one content in both; counters of batches are not read."""
    dtype = first.stored[name].dtype
    if dtype is None or dtype.kind not in "fV":
        return True
    return np.array_equal(first.read(name), other.read(name))
