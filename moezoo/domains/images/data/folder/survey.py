"""A dry run through a folder: every file is decoded, counted, and the wrong ones are told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moezoo.data.progress import progress
from moezoo.data.source import SourceExample
from moezoo.domains.images.data.folder.listing import SPLITS
from moezoo.domains.images.data.folder.own import OwnData, Size, make_task
from moezoo.domains.images.data.folder.reader import look
from moezoo.errors import UserError
from moezoo.train import pictures

STRETCHED = 1.02  # ratio of proportions from which one sees it
SIDE = 320  # longest side of an image on a sheet


@dataclass
class MapCounts:
    """What the labels of one task hold; a whole image's class counts as one pixel.

    classes: pixels of each class by split, int64 [classes].   low, high: the range of numbers that
    are known, in the unit of the task.
    """

    classes: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    known: int = 0
    pixels: int = 0
    blank: list[str] = field(default_factory=list)
    low: float = np.inf
    high: float = -np.inf

    @property
    def unknown(self) -> float:
        """The share of pixels without a label."""
        return 1 - self.known / max(self.pixels, 1)


@dataclass
class FolderSurvey:
    """What `survey` found: sizes of images, labels by task, and a sentence for each wrong file."""

    folder: OwnData
    sizes: Counter[Size] = field(default_factory=Counter)
    counts: dict[str, MapCounts] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def survey(root: Path) -> FolderSurvey:
    """Everything in a folder, decoded once. Raises UserError where files do not go together."""
    folder = look(root)
    found = FolderSurvey(folder, counts={task: MapCounts() for task in folder.tasks})
    pairs = [(split, name) for split in SPLITS for name in folder.splits[split]]

    def decoded(pair: tuple[str, str]) -> tuple[Size, dict[str, MapCounts], list[str]]:
        return _of_image(folder, *pair)

    with ThreadPoolExecutor() as threads, progress(f"checking {root}", "images") as bar:
        for size, counts, faults in bar.track(threads.map(decoded, pairs), total=len(pairs)):
            found.faults += faults
            found.sizes[size] += not faults
            for task, one in counts.items():
                _add(found.counts[task], one)
    return found


def _of_image(
    folder: OwnData, split: str, name: str
) -> tuple[Size, dict[str, MapCounts], list[str]]:
    """Size, counts and faults of an image and its labels."""
    counts, faults, size = {}, [], (0, 0)
    try:
        height, width, _ = folder.image(name).shape
        size = (height, width)
    except UserError as error:
        faults.append(str(error))
    for task in folder.tasks:
        try:
            label = folder.label(task, name)
            if not faults and folder.kinds[task].per_pixel:
                folder.check_size(task, name, size, label.shape[:2])
            counts[task] = _counted(folder, task, split, name, label)
        except UserError as error:
            faults.append(str(error))
    return size, counts, faults


def _counted(folder: OwnData, task: str, split: str, name: str, label: np.ndarray) -> MapCounts:
    kind, made = folder.kinds[task], MapCounts()
    known = kind.known(label)
    known = known[..., 0] if kind.form == "vector" else known
    made.pixels, made.known = known.size, int(known.sum())
    made.blank = [] if known.any() else [name]
    if kind.classes:
        count = folder.labels[task].classes if task in folder.labels else 2
        pixels = np.bincount(label[known].astype(np.int64), minlength=count)
        made.classes, made.images = {split: pixels}, {split: (pixels > 0).astype(np.int64)}
    elif kind.form == "value" and known.any():
        made.low, made.high = float(label[known].min()), float(label[known].max())
    return made


def _add(total: MapCounts, one: MapCounts) -> None:
    for ours, theirs in ((total.classes, one.classes), (total.images, one.images)):
        for split, counts in theirs.items():
            ours[split] = ours.get(split, np.zeros_like(counts)) + counts
    total.known, total.pixels = total.known + one.known, total.pixels + one.pixels
    total.blank += one.blank
    total.low, total.high = min(total.low, one.low), max(total.high, one.high)


def notes(found: FolderSurvey, resolution: Size) -> list[str]:
    """What is no fault, but may be a surprise: one sentence each."""
    said = list(found.folder.notes)
    ratio = resolution[1] / resolution[0]
    stretch = [max(w / h / ratio, ratio * h / w) for h, w in found.sizes if h]
    if stretch and max(stretch) > STRETCHED:
        said.append(
            f"At data.resolution {resolution[0]} {resolution[1]} the proportions of images change "
            f"by up to {100 * (max(stretch) - 1):.0f} %: choose one with their own proportions."
        )
    for task, counts in found.counts.items():
        if counts.blank:
            said.append(
                f"{task} of '{counts.blank[0]}' has no labelled pixel"
                + (f", nor have {len(counts.blank) - 1:,} others." if counts.blank[1:] else ".")
            )
        for split in SPLITS:
            missing = np.flatnonzero(counts.images.get(split, np.ones(1)) == 0)
            if missing.size:
                said.append(f"No {split} image has {_named(found.folder, task, missing)}.")
    return said


def _named(folder: OwnData, task: str, classes: Sequence[int] | np.ndarray) -> str:
    """Some classes of a task in words."""
    if task not in folder.labels:
        return f"{task} {' or '.join(map(str, classes))}"
    names = folder.labels[task].names
    first = ", ".join(f"{i} ({names[i]})" for i in classes[:6])
    rest = f" and {len(classes) - 6} more" if len(classes) > 6 else ""
    return f"the {task} class {first}{rest}"


def sheet(found: FolderSurvey, count: int) -> list[pictures.Column]:
    """A few images, evenly chosen, beside the paintings of all of their labels."""
    folder = found.folder
    every = folder.names
    chosen = [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).astype(int)]
    examples = [_shown(folder, name) for name in chosen]
    columns = [pictures.Column({"image": [one["image"] for one in examples]}, None)]
    for task in folder.tasks:
        labels = folder.labels.get(task)
        made = make_task(task, labels.classes if labels else None, labels)
        column = pictures.predictions_of(made, [one[task] for one in examples], {})
        columns.append(pictures.Column({task: next(iter(column.shown.values()))}, column.key))
    return columns


def _shown(folder: OwnData, name: str) -> SourceExample:
    """An example in its own proportions, not larger than a sheet shows it."""
    height, width = folder.image_size(name)
    factor = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return folder.example(name, size)
