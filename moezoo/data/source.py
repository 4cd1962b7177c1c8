"""Sources: random access to decoded examples, and what their labels mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from moezoo.label import LabelKind, declared

SourceExample = dict[str, np.ndarray]
Batch = dict[str, Any]
Transform = Callable[[SourceExample, np.random.Generator], SourceExample]

NO_REGION = 65535  # outside the image; 0 to 459 are kinds of region
REGIONS = LabelKind("class", NO_REGION, dtype="uint16")
Kinds = Mapping[str, LabelKind]


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
    """What a source contains: image size, tasks, class names of the tasks that have classes.

    `kinds` declares the kind of every task's label and of every extra: it alone, never a name,
    decides what is done to labels. Raises UserError if one is not declared.

    Images and their labels may be smaller or larger than `resolution`, the size of batches. In the
    tasks of `foreground_only`, a label map of nothing but background counts as unlabelled.
    `extras` are maps that no task learns and only scores read; augmentations do not touch them.
    """

    name: str
    split: str
    resolution: tuple[int, int]
    tasks: tuple[str, ...]
    labels: Mapping[str, Labels]
    foreground_only: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    kinds: Kinds = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.tasks, *self.extras):
            what = f"The data set {self.name} has the label {name} and"
            declared(self.kinds.get(name), what, f"give Info(kinds={{'{name}': ...}})")

    @property
    def maps(self) -> tuple[str, ...]:
        """The tasks whose labels are maps, one value per pixel."""
        return tuple(task for task in self.tasks if self.kinds[task].per_pixel)


@runtime_checkable
class Source(Protocol):
    """Examples by index.

    An example has `image` uint8 [H,W,3] and the labels that `info.tasks` and `info.extras` name, in
    the form of their kinds (`moezoo.label`). In this project `semseg` and `parts` are classes;
    `edge`, `saliency` binary; `depth` metres, 0 if unknown; `normals` unit vectors in the camera
    frame, 0 if unknown; `scene` one class for the image; 255 is unlabelled in class maps.
    The extras may include `regions` uint16 [H,W], the kind of region.
    """

    @property
    def info(self) -> Info: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> SourceExample: ...


class ArraySource:
    """A source held in memory: one array per feature, examples first."""

    def __init__(self, info: Info, arrays: Mapping[str, np.ndarray], texts: Sequence[str] = ()):
        self._info, self.arrays, self.captions = info, dict(arrays), list(texts)
        sizes = {name: len(a) for name, a in arrays.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"features differ in length: {sizes}")

    @property
    def info(self) -> Info:
        """What the source contains."""
        return self._info

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> SourceExample:
        return {name: a[index] for name, a in self.arrays.items()}


def blank(info: Info) -> ArraySource:
    """One black example without labels, for tools that need the form of batches and no data."""
    arrays: dict[str, np.ndarray] = {"image": np.zeros((1, *info.resolution, 3), np.uint8)}
    for name in (*info.tasks, *info.extras):
        arrays[name] = info.kinds[name].blank(info.resolution)[None]
    return ArraySource(info, arrays)


class Decoded:
    """A source over any random-access store of decoded records (a tfds data source)."""

    def __init__(self, info: Info, records: Any):
        self._info, self.records = info, records

    @property
    def info(self) -> Info:
        """What the source contains."""
        return self._info

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> SourceExample:
        return self._arrays(self.records[index])

    def _arrays(self, record: Mapping[str, Any]) -> SourceExample:
        names = ("image", *self._info.tasks, *self._info.extras, "intrinsics")
        kinds = self._info.kinds
        # tfds stores the classes of whole images in 64 bits
        types = {name: kinds[name].type for name in self._info.tasks if not kinds[name].per_pixel}
        return {
            name: x[..., 0] if x.ndim == 3 and x.shape[-1] == 1 else x
            for name in names
            if name in record
            for x in [np.asarray(record[name], types.get(name))]
        }

    def in_memory(self) -> ArraySource:
        """The same source with every example decoded once."""
        first = self[0]
        arrays = {k: np.empty((len(self), *v.shape), v.dtype) for k, v in first.items()}
        texts = []
        for index in range(len(self)):
            record = self.records[index]
            for name, x in self._arrays(record).items():
                arrays[name][index] = x
            texts.append(bytes(record.get("caption", b"")).decode())
        return ArraySource(self._info, arrays, texts)


class EachOnce:
    """Examples by index, from the end too; each is decoded only once if `remember` is given.

    The class that inherits has a length, and decodes an example in `decode`.
    """

    def __init__(self, remember: bool):
        self._seen: dict[int, SourceExample] | None = {} if remember else None

    def __len__(self) -> int:
        raise NotImplementedError

    def decode(self, index: int) -> SourceExample:
        """The example of an index from 0 to below the length."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> SourceExample:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"example {index} of {count}")
        index %= count
        if self._seen is not None and index in self._seen:
            return dict(self._seen[index])
        example = self.decode(index)
        if self._seen is not None:
            self._seen[index] = example
        return dict(example)


class First:
    """The first examples of a source."""

    def __init__(self, source: Source, count: int):
        self.source, self.count = source, min(count, len(source))

    @property
    def info(self) -> Info:
        """What the source contains."""
        return self.source.info

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SourceExample:
        if not -self.count <= index < self.count:
            raise IndexError(f"example {index} of {self.count}")
        return self.source[index % self.count]
