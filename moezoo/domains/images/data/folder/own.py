"""Data of one's own that was looked through: images, their labels by task, classes, two splits.

What lies where is the knowledge of a layout: files by name (`plain`), annotations of COCO (`coco`),
tables of Hugging Face (`tables`). Images and maps are brought to the size of batches, whatever
their proportions, as predictions of photos are: images bilinearly with a low-pass filter, maps at
the nearest pixel, lines (edges) so that none gets lost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from moezoo.data.source import Info, Labels, SourceExample
from moezoo.deploy.runtime import drawing
from moezoo.domains.images.data import resample
from moezoo.domains.images.data.folder import settings
from moezoo.domains.images.data.folder.listing import Kinds
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
Stamp = tuple[tuple[str, int, int], ...]


class OwnData(ABC):
    """What a layout found.

    root: the folder.   kinds: of the labels of all tasks that there are.   labels: the classes of
    tasks that have some.   splits: names of the `train` and `test` images.   notes: what was left
    out, a sentence each.
    """

    root: Path
    settings: settings.FolderSettings
    kinds: Kinds
    labels: Mapping[str, Labels]
    splits: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()

    @property
    @abstractmethod
    def tasks(self) -> tuple[str, ...]:
        """The tasks that have labels, in the order of the table."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The names of all images."""

    @abstractmethod
    def image(self, name: str) -> np.ndarray:
        """An image, uint8 [H,W,3]. Raises UserError."""

    @abstractmethod
    def image_size(self, name: str) -> Size:
        """Height and width of an image, without decoding it. Raises UserError."""

    @abstractmethod
    def label(self, task: str, name: str) -> np.ndarray:
        """The label of an image at its own size. Raises UserError."""

    @abstractmethod
    def label_sizes(self, name: str) -> Mapping[str, Size]:
        """By task height and width of an image's maps, without decoding them. Raises UserError."""

    @abstractmethod
    def places(self, task: str, name: str) -> tuple[str, str]:
        """Where a label and its image lie, for sentences about them."""

    def info(self, split: str, resolution: Size) -> Info:
        """What a split contains."""
        kinds = {task: self.kinds[task] for task in self.tasks}
        return Info(NAME, split, resolution, self.tasks, self.labels, kinds=kinds)

    def example(self, name: str, size: Size) -> SourceExample:
        """An image and all of its labels at one size. Raises UserError."""
        image = self.image(name)
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
        own, its = self.places(task, name)
        raise UserError(
            f"{own} has {label[0]} x {label[1]} pixels, but its image {its} {image[0]} x "
            f"{image[1]}{note}: save both at one size."
        )

    def check_sizes(self) -> None:
        """UserError for a map of another size than its image, by headers alone."""
        for name in self.names:
            size = self.image_size(name)
            for task, found in self.label_sizes(name).items():
                self.check_size(task, name, size, found)


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


def stamp(paths: Iterable[Path]) -> Stamp:
    """What changes when one of the files does."""
    stats = ((path, path.stat()) for path in paths)
    return tuple((str(path), about.st_mtime_ns, about.st_size) for path, about in stats)


def classes_of(
    task: str, names: tuple[str, ...], where: str, given: settings.FolderSettings
) -> Labels:
    """A task's classes by their names, in the colours that are given or else chosen."""
    if not 2 <= len(names) <= settings.MOST_CLASSES:
        raise UserError(
            f"{where} has {len(names) or 'no'} class{'es' * (len(names) > 1)}, and it must have "
            f"from 2 to {settings.MOST_CLASSES}: number them from 0 (255 means unlabelled)."
        )
    return Labels(names, _colours(task, len(names), given))


def largest(read: Callable[[str], np.ndarray], kind: LabelKind, names: Iterable[str]) -> int:
    """The largest class of any map; -1 where all are unlabelled."""

    def of(name: str) -> int:
        values = read(name)
        known = values[kind.known(values)]
        return int(known.max()) if known.size else -1

    with ThreadPoolExecutor() as threads:  # decoding is done outside of Python
        try:
            return max(threads.map(of, names))
        finally:  # at a fault, the files behind it need not be read
            threads.shutdown(wait=False, cancel_futures=True)


def check_sections(
    root: Path,
    given: settings.FolderSettings,
    classes: Iterable[str],
    maps: Iterable[str],
) -> None:
    """UserError for a task in `folder.json` that is not in the folder or has no such thing.

    classes: the tasks with classes;   maps: those of whose maps a number may mean "no label".
    """
    path = root / settings.FILE
    for section, tasks, known in (
        ("classes", given.classes, classes),
        ("colours", given.colours, classes),
        ("unlabelled", given.unlabelled, maps),
    ):
        for task in tasks:
            if task not in known:
                raise unknown(f"task in {section} of '{path}'", task[:80], list(known))
    for task, colours in given.colours.items():
        names = given.classes.get(task)
        if names is not None and len(names) != len(colours):
            raise UserError(
                f"'{path}' has {len(names)} classes of {task}, but {len(colours)} colours: give "
                "one colour for each class."
            )


def _colours(task: str, count: int, given: settings.FolderSettings) -> np.ndarray:
    colours = np.array(given.colours.get(task, ()), np.uint8).reshape(-1, 3)
    if len(colours) > count:
        raise UserError(
            f"{settings.FILE} has {len(colours)} colours for the {count} classes of {task}: name "
            "all classes there, too."
        )
    return np.concatenate([colours, painting.palette(count)[len(colours) :]])


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
