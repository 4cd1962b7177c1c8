"""Data of one's own as a source, in whatever layout it comes; see `own`.

Nothing is written into the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moezoo.data.source import EachOnce, Info, SourceExample
from moezoo.domains.images.data.folder import coco, plain, settings, tables
from moezoo.domains.images.data.folder.own import OwnData, Size, kind_of, stamp
from moezoo.domains.images.tasks import TASKS

# Modules with `SETTINGS`, `recognises`, `files` (what is to be read, compared to see whether it has
# changed) and `look`. The first that recognises a folder looks through it.
LAYOUTS = (coco, tables, plain)


class FolderSource(EachOnce):
    """The examples of one split; each is decoded only once if `remember` is given."""

    def __init__(self, folder: OwnData, split: str, size: Size, remember: bool = False):
        super().__init__(remember)
        self.info = folder.info(split, size)
        self.folder, self.names = folder, folder.splits[split]

    def __len__(self) -> int:
        return len(self.names)

    def decode(self, index: int) -> SourceExample:
        """The image of this number and its labels, at the size of batches."""
        return self.folder.example(self.names[index], self.info.resolution)


def open_folder(root: Path, split: str, size: Size, memory: int = 0) -> FolderSource:
    """One split. Decoded examples stay in memory if all of them take less than `memory` bytes.

    Raises UserError where files do not go together, also for a map of another size than its image;
    what is wrong inside of a file, when it is read.
    """
    folder = look(root)
    _check_sizes(folder)
    first = FolderSource(folder, split, size)[0]
    taken = sum(value.nbytes for value in first.values()) * len(folder.splits[split])
    return FolderSource(folder, split, size, remember=taken < memory)


def describe(root: Path, split: str, resolution: Size) -> Info:
    """What a split contains; decodes no image, and maps only where classes have no names."""
    return look(root).info(split, resolution)


_LOOKED: dict[Path, tuple[Any, OwnData]] = {}  # both splits and their form look at one folder
_MEASURED: dict[Path, OwnData] = {}


def look(root: Path) -> OwnData:
    """What is in the folder; read again only if a file has changed. Raises UserError."""
    given = settings.read(root)
    kinds = {task: kind_of(task) for task in TASKS}
    layout = next(one for one in LAYOUTS if one.recognises(root))
    settings.check_meant(root, given, layout.SETTINGS)
    files = layout.files(root, given, kinds)
    state = (files, given, kinds, stamp(files.paths))
    before = _LOOKED.get(root.resolve())
    if before and before[0] == state:
        return before[1]
    found = layout.look(files, given, kinds)
    _LOOKED[root.resolve()] = state, found
    return found


def _check_sizes(folder: OwnData) -> None:
    root = folder.root.resolve()
    if _MEASURED.get(root) is not folder:
        folder.check_sizes()
        _MEASURED[root] = folder
