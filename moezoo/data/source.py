"""Sources: random access to decoded examples, and what their labels mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

Example = dict[str, np.ndarray]

IMAGE_TASKS = ("semseg", "parts", "saliency", "normals", "edge", "depth")
MAPS = ("image", *IMAGE_TASKS)
NO_REGION = 65535  # outside of the image; 0 to 459 are kinds of region
CLASS_TYPES = {"scene": np.uint8}  # tfds stores the classes of whole images in 64 bits


@dataclass(frozen=True)
class Labels:
    """The classes of a label map: their names and a palette uint8 [classes,3]."""

    names: tuple[str, ...]
    palette: np.ndarray = field(repr=False)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)


@dataclass(frozen=True)
class Info:
    """What a source holds: image size, tasks, class names of the tasks that have classes.

    Images and their labels may be smaller or larger than `resolution`, the size of batches. In the
    tasks of `foreground_only`, a label map of nothing but background counts as unlabelled.
    `extras` are maps that no task learns and only scores read; augmentations leave them alone.
    """

    name: str
    split: str
    resolution: tuple[int, int]
    tasks: tuple[str, ...]
    labels: Mapping[str, Labels]
    foreground_only: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()

    @property
    def maps(self) -> tuple[str, ...]:
        """The tasks whose labels are maps, one value per pixel."""
        return tuple(task for task in self.tasks if task in IMAGE_TASKS)


@runtime_checkable
class Source(Protocol):
    """Examples by index.

    An example has `image` uint8 [H,W,3]; `semseg`, `parts` uint8 [H,W]; `edge`, `saliency` uint8
    [H,W] 0/1 (255 is ignored in all four); `depth` float32 [H,W] metres, 0 where unknown; `normals`
    float32 [H,W,3] unit vectors in the camera frame, 0 where unknown; `scene` uint8, one number for
    the image, 255 where unknown. A source has those it names in `info.tasks`. Among the extras
    there may be `regions` uint16 [H,W], the kind of region.
    """

    @property
    def info(self) -> Info: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Arrays:
    """A source held in memory: one array per feature, examples first."""

    def __init__(self, info: Info, arrays: Mapping[str, np.ndarray], texts: Sequence[str] = ()):
        self._info, self.arrays, self.captions = info, dict(arrays), list(texts)
        sizes = {name: len(a) for name, a in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"features differ in length: {sizes}")

    @property
    def info(self) -> Info:
        """What the source holds."""
        return self._info

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> Example:
        return {name: a[index] for name, a in self.arrays.items()}


def blank(info: Info) -> Arrays:
    """One black example without labels, for tools that need the form of batches and no data."""
    arrays: dict[str, np.ndarray] = {"image": np.zeros((1, *info.resolution, 3), np.uint8)}
    unknown = {"depth": np.zeros((), np.float32), "normals": np.zeros(3, np.float32)}
    unknown |= {"regions": np.asarray(NO_REGION, np.uint16)}
    for name in (*info.tasks, *info.extras):
        value = unknown.get(name, np.uint8(255))
        size = info.resolution if name in (*IMAGE_TASKS, *info.extras) else ()
        arrays[name] = np.broadcast_to(value, (1, *size, *np.shape(value))).copy()
    return Arrays(info, arrays)


class Decoded:
    """A source over any random-access store of decoded records (a tfds data source)."""

    def __init__(self, info: Info, records: Any):
        self._info, self.records = info, records

    @property
    def info(self) -> Info:
        """What the source holds."""
        return self._info

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        return self._arrays(self.records[index])

    def _arrays(self, record: Mapping[str, Any]) -> Example:
        names = ("image", *self._info.tasks, *self._info.extras, "intrinsics")
        return {
            name: x[..., 0] if x.ndim == 3 and x.shape[-1] == 1 else x
            for name in names
            if name in record
            for x in [np.asarray(record[name], CLASS_TYPES.get(name))]
        }

    def in_memory(self) -> Arrays:
        """The same source with every example decoded once."""
        first = self[0]
        arrays = {k: np.empty((len(self), *v.shape), v.dtype) for k, v in first.items()}
        texts = []
        for index in range(len(self)):
            record = self.records[index]
            for name, x in self._arrays(record).items():
                arrays[name][index] = x
            texts.append(bytes(record.get("caption", b"")).decode())
        return Arrays(self._info, arrays, texts)


class First:
    """The first examples of a source."""

    def __init__(self, source: Source, count: int):
        self.source, self.count = source, min(count, len(source))

    @property
    def info(self) -> Info:
        """What the source holds."""
        return self.source.info

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        if not -self.count <= index < self.count:
            raise IndexError(f"example {index} of {self.count}")
        return self.source[index % self.count]
