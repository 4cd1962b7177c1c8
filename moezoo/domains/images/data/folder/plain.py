"""A folder of images, and of labels by the names of images: see `listing` for what lies where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moezoo.data.source import Labels
from moezoo.domains.images.data.folder import labels as read_label
from moezoo.domains.images.data.folder import listing, own, settings
from moezoo.domains.images.data.folder.labels import MapFile, MapReader
from moezoo.domains.images.data.folder.listing import FolderFiles, Kinds
from moezoo.domains.images.data.folder.own import OwnData, Size
from moezoo.errors import unknown
from moezoo.label import LabelKind

# What of `folder.json` means something here.
SETTINGS = ("classes", "colours", "unlabelled", "depth", "test", "test_share")


@dataclass(frozen=True)
class OwnFolder(OwnData):
    """Images and labels that are files of one name."""

    files: FolderFiles
    settings: settings.FolderSettings
    kinds: Kinds
    labels: Mapping[str, Labels]

    @property
    def root(self) -> Path:  # type: ignore[override]
        """The folder."""
        return self.files.root

    @property
    def splits(self) -> Mapping[str, tuple[str, ...]]:  # type: ignore[override]
        """Names of the `train` and `test` images."""
        return self.files.splits

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have labels, in the order of the table."""
        return tuple(t for t in self.kinds if t in self.files.maps or t in self.files.words)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all images."""
        return tuple(self.files.images)

    def image(self, name: str) -> np.ndarray:
        """An image, uint8 [H,W,3]. Raises UserError."""
        return read_label.image(self.files.images[name])

    def image_size(self, name: str) -> Size:
        """Height and width of an image, from its header. Raises UserError."""
        return read_label.size_of(self.files.images[name])

    def label(self, task: str, name: str) -> np.ndarray:
        """The label of an image at its own size. Raises UserError."""
        if task in self.files.maps:
            read = _reader(task, self.kinds[task], self.settings, self.labels)
            return read(MapFile(self.files.maps[task][name]))
        word = self.files.words[task][name]
        kind = self.kinds[task]
        return np.array(self.labels[task].names.index(word) if word else kind.unknown, kind.type)

    def label_sizes(self, name: str) -> Mapping[str, Size]:
        """By task height and width of an image's maps, from their headers. Raises UserError."""
        return {task: read_label.size_of(maps[name]) for task, maps in self.files.maps.items()}

    def places(self, task: str, name: str) -> tuple[str, str]:
        """Where a label and its image lie, for sentences about them."""
        return f"'{self.files.maps[task][name]}'", f"'{self.files.images[name].name}'"


def recognises(root: Path) -> bool:
    """Whether this layout is to look through a folder: any that no other one knows."""
    return True


def files(root: Path, given: settings.FolderSettings, kinds: Kinds) -> FolderFiles:
    """The files and how they go together. Raises UserError where they do not."""
    return listing.look(root, kinds, given)


def look(found: FolderFiles, given: settings.FolderSettings, kinds: Kinds) -> OwnFolder:
    """The folder with its classes. Raises UserError."""
    classes = [t for t in (*found.maps, *found.words) if kinds[t].form in ("class", "image")]
    maps = [task for task in found.maps if kinds[task].classes]
    own.check_sections(found.root, given, classes, maps)
    labels = {task: _labels(task, found, given, kinds[task]) for task in classes}
    return OwnFolder(found, given, kinds, labels)


def _reader(
    task: str, kind: LabelKind, given: settings.FolderSettings, labels: Mapping[str, Labels]
) -> MapReader:
    return MapReader(task, kind, given, labels[task].classes if task in labels else None)


def _labels(
    task: str, files: FolderFiles, given: settings.FolderSettings, kind: LabelKind
) -> Labels:
    """Named by `folder.json`, else by the words or the largest index that occur."""
    named = given.classes.get(task)
    if task in files.words:
        path, occur = files.root / f"{task}.csv", sorted(set(files.words[task].values()) - {""})
        if named and (odd := [word for word in occur if word not in named]):
            raise unknown(f"class in '{path}'", odd[0], list(named))
        named = named or tuple(occur)
    else:
        path, maps = files.root / task, files.maps[task]
        if named is None:
            read = _reader(task, kind, given, {})
            most = own.largest(lambda name: read(MapFile(maps[name])), kind, maps)
            named = tuple(f"class {index}" for index in range(most + 1))
    return own.classes_of(task, named, f"'{path}'", given)
