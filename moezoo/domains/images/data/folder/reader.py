"""A folder of images and labels as a source: see `listing` for what lies where.

Images and maps are brought to the size of batches, whatever their proportions, as predictions of
photos are: images bilinearly with a low-pass filter, maps at the nearest pixel, lines (edges) so
that none gets lost. Nothing is written into the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moezoo.data.source import EachOnce, Info, Labels, SourceExample
from moezoo.deploy.runtime import drawing
from moezoo.domains.images.data import resample
from moezoo.domains.images.data.folder import labels as read_label
from moezoo.domains.images.data.folder import listing, settings
from moezoo.domains.images.data.folder.labels import MapReader
from moezoo.domains.images.data.folder.listing import FolderFiles, Kinds
from moezoo.domains.images.protocol import ProtocolConfig
from moezoo.domains.images.tasks import TASKS
from moezoo.domains.images.thinning import thin
from moezoo.errors import UserError, unknown
from moezoo.label import LabelKind
from moezoo.tasks import painting, registry
from moezoo.tasks.base import Task

NAME = "folder"
LINES = ("edge",)  # tasks whose label is thin lines, most of which the nearest pixels would miss
Size = tuple[int, int]


@dataclass(frozen=True)
class OwnFolder:
    """A folder that was looked through: its files, the kinds of its labels and their classes."""

    files: FolderFiles
    settings: settings.FolderSettings
    kinds: Kinds
    labels: Mapping[str, Labels]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have labels, in the order of the table."""
        return tuple(t for t in self.kinds if t in self.files.maps or t in self.files.words)

    def info(self, split: str, resolution: Size) -> Info:
        """What a split contains."""
        kinds = {task: self.kinds[task] for task in self.tasks}
        return Info(NAME, split, resolution, self.tasks, self.labels, kinds=kinds)

    def reader(self, task: str) -> MapReader:
        """What reads the maps of a task."""
        return _reader(task, self.kinds[task], self.settings, self.labels)

    def label(self, task: str, name: str) -> np.ndarray:
        """The label of an image at its own size. Raises UserError."""
        if task in self.files.maps:
            return self.reader(task)(self.files.maps[task][name])
        word = self.files.words[task][name]
        kind = self.kinds[task]
        return np.array(self.labels[task].names.index(word) if word else kind.unknown, kind.type)

    def example(self, name: str, size: Size) -> SourceExample:
        """An image and all of its labels at one size. Raises UserError."""
        image = read_label.image(self.files.images[name])
        made = {"image": drawing.resize(image, size, "bilinear")}
        for task in self.tasks:
            label = self.label(task, name)
            if self.kinds[task].per_pixel:
                self.check_size(task, name, image.shape[:2], label.shape[:2])
                label = _at(label, self.kinds[task], size, lines=task in LINES)
            made[task] = label
        return made

    def check_size(self, task: str, name: str, image: tuple[int, ...], label: tuple) -> None:
        """UserError for a label of another size than its image."""
        if image == label:
            return
        turned = image == label[::-1]
        note = " (the image is turned by what its camera noted, EXIF)" if turned else ""
        raise UserError(
            f"'{self.files.maps[task][name]}' has {label[0]} x {label[1]} pixels, but its image "
            f"'{self.files.images[name].name}' {image[0]} x {image[1]}{note}: save both at one "
            "size."
        )


class FolderSource(EachOnce):
    """The examples of one split; each is decoded only once if `remember` is given."""

    def __init__(self, folder: OwnFolder, split: str, size: Size, remember: bool = False):
        super().__init__(remember)
        self.info = folder.info(split, size)
        self.folder, self.names = folder, folder.files.splits[split]

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
    taken = sum(value.nbytes for value in first.values()) * len(folder.files.splits[split])
    return FolderSource(folder, split, size, remember=taken < memory)


def describe(root: Path, split: str, resolution: Size) -> Info:
    """What a split contains; decodes no image, and maps only where classes have no names."""
    return look(root).info(split, resolution)


_Stamp = tuple[tuple[str, int, int], ...]
_LOOKED: dict[Path, tuple[_Stamp, OwnFolder]] = {}  # both splits and their form look at one folder
_MEASURED: dict[Path, OwnFolder] = {}


def look(root: Path) -> OwnFolder:
    """The folder's files and classes; again only if a file has changed. Raises UserError."""
    given = settings.read(root)
    kinds = {task: kind_of(task) for task in TASKS}
    files = listing.look(root, kinds, given)
    _check_settings(files, given, kinds)
    stamp = _stamp(files)
    before = _LOOKED.get(root.resolve())
    if before and before[0] == stamp and before[1].settings == given:
        if (before[1].files, before[1].kinds) == (files, kinds):
            return before[1]
    labels = {}
    for task in _with_classes(files, kinds):
        names = _class_names(task, files, given, kinds[task])
        labels[task] = Labels(names, _colours(task, len(names), given))
    found = OwnFolder(files, given, kinds, labels)
    _LOOKED[root.resolve()] = stamp, found
    return found


def kind_of(task: str) -> LabelKind:
    """The kind of a task's label, which does not depend on the data."""
    kind = make_task(task, 2).label
    assert kind is not None  # `Task` refuses to be made without
    return kind


def make_task(task: str, count: int | None, labels: Labels | None = None) -> Task:
    """A task as a run on a folder poses it, with the classes of its labels."""
    names, colours = (labels.names, labels.palette) if labels else ((), None)
    facts = registry.TaskFacts(task, NAME, ProtocolConfig(), 0.0, count, names, colours)
    return registry.make(TASKS, facts)


def _stamp(files: FolderFiles) -> _Stamp:
    stats = ((path, path.stat()) for path in files.paths)
    return tuple((str(path), about.st_mtime_ns, about.st_size) for path, about in stats)


def _with_classes(files: FolderFiles, kinds: Kinds) -> list[str]:
    return [t for t in (*files.maps, *files.words) if kinds[t].form in ("class", "image")]


def _check_settings(files: FolderFiles, given: settings.FolderSettings, kinds: Kinds) -> None:
    """UserError for a task in `folder.json` that is not in the folder or has no such thing."""
    path, classes = files.root / settings.FILE, _with_classes(files, kinds)
    maps = [task for task in files.maps if kinds[task].classes]
    for section, named, known in (
        ("classes", given.classes, classes),
        ("colours", given.colours, classes),
        ("unlabelled", given.unlabelled, maps),
    ):
        for task in named:
            if task not in known:
                raise unknown(f"task in {section} of '{path}'", task[:80], known)
    for task, colours in given.colours.items():
        names = given.classes.get(task)
        if names is not None and len(names) != len(colours):
            raise UserError(
                f"'{path}' has {len(names)} classes of {task}, but {len(colours)} colours: give "
                "one colour for each class."
            )


def _reader(
    task: str, kind: LabelKind, given: settings.FolderSettings, labels: Mapping[str, Labels]
) -> MapReader:
    return MapReader(task, kind, given, labels[task].classes if task in labels else None)


def _class_names(
    task: str, files: FolderFiles, given: settings.FolderSettings, kind: LabelKind
) -> tuple[str, ...]:
    """Given by `folder.json`, else by the words or the largest index that occur."""
    named = given.classes.get(task)
    if task in files.words:
        path, occur = files.root / f"{task}.csv", sorted(set(files.words[task].values()) - {""})
        if named and (odd := [word for word in occur if word not in named]):
            raise unknown(f"class in '{path}'", odd[0], list(named))
        named = named or tuple(occur)
    else:
        path = files.root / task
        if named is None:
            largest = _largest(_reader(task, kind, given, {}), files.maps[task])
            named = tuple(f"class {index}" for index in range(largest + 1))
    if not 2 <= len(named) <= settings.MOST_CLASSES:
        raise UserError(
            f"'{path}' has {len(named) or 'no'} class{'es' * (len(named) > 1)}, and it must have "
            f"from 2 to {settings.MOST_CLASSES}: number them from 0 (255 means unlabelled)."
        )
    return named


def _largest(reader: MapReader, files: Mapping[str, Path]) -> int:
    """The largest class of any map; -1 where all are unlabelled."""

    def of(path: Path) -> int:
        values = reader(path)
        known = values[reader.kind.known(values)]
        return int(known.max()) if known.size else -1

    with ThreadPoolExecutor() as threads:  # decoding is done outside of Python
        try:
            return max(threads.map(of, files.values()))
        finally:  # at a fault, the files behind it need not be read
            threads.shutdown(wait=False, cancel_futures=True)


def _colours(task: str, count: int, given: settings.FolderSettings) -> np.ndarray:
    colours = np.array(given.colours.get(task, ()), np.uint8).reshape(-1, 3)
    if len(colours) > count:
        raise UserError(
            f"{settings.FILE} has {len(colours)} colours for the {count} classes of {task}: name "
            "all classes there, too."
        )
    return np.concatenate([colours, painting.palette(count)[len(colours) :]])


def _check_sizes(folder: OwnFolder) -> None:
    """UserError for a map of another size than its image, by headers alone."""
    root = folder.files.root.resolve()
    if _MEASURED.get(root) is folder:
        return
    for name, image in folder.files.images.items():
        size = read_label.size_of(image)
        for task, maps in folder.files.maps.items():
            folder.check_size(task, name, size, read_label.size_of(maps[name]))
    _MEASURED[root] = folder


def _at(values: np.ndarray, kind: LabelKind, size: Size, lines: bool) -> np.ndarray:
    """A map at another size."""
    made = resample.nearest(values, size)
    smaller = size[0] < values.shape[0] or size[1] < values.shape[1]
    if not (lines and smaller and kind.form == "binary"):
        return made
    rows, columns = np.nonzero(values == 1)
    drawn = np.zeros(size, bool)
    drawn[rows * size[0] // values.shape[0], columns * size[1] // values.shape[1]] = True
    drawn = thin(drawn)
    return np.where(drawn, 1, np.where(made == 1, 0, made)).astype(kind.type)
