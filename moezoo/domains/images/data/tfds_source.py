"""Any data set of tensorflow-datasets with dense labels, through a small mapping.

Pictures are resized to the size of batches, whatever their proportions (images bilinearly without
a low-pass filter, maps at the nearest pixel); then one pure function per task makes the label from
the record, so that lines are drawn at the size at which they are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moezoo.data import picture
from moezoo.data.source import Decoded, EachOnce, Info, Kinds, Labels, SourceExample
from moezoo.domains.images.data import resample
from moezoo.errors import UserError
from moezoo.label import declared

TfdsRecord = Mapping[str, Any]
Size = tuple[int, int]


@dataclass(frozen=True)
class TfdsMapping:
    """How the records of a tfds data set become examples of this project.

    name      of the data set in configurations
    dataset   tfds's name for it, with configuration and version if it has several
    splits    tfds's expression for each of our splits, for example `train[:90%]`
    maps      the features that are pictures of labels [H,W,C]; they are resized
    tasks     per task, the label (conventions of `Source`) from a record with resized pictures
    kinds     the kind of each task's label (`moezoo.label`)
    labels    names and colours of the classes
    image     the feature that is the image
    builder   (dataset, given folder, data_dir) -> builder, in place of tfds's own: most of those
              unpack archives with TensorFlow, so without it they only read what was prepared before
    """

    name: str
    dataset: str
    splits: Mapping[str, str]
    maps: tuple[str, ...]
    tasks: Mapping[str, Callable[[TfdsRecord], np.ndarray]]
    kinds: Kinds
    labels: Mapping[str, Labels]
    image: str = "image"
    builder: Callable[[str, Path | None, Path], Any] | None = None

    def __post_init__(self) -> None:
        for task in self.tasks:
            what = f"The mapping of {self.name} has the label {task} and"
            kind = declared(self.kinds.get(task), what, f"give its `kinds` for '{task}'")
            if kind.form in ("class", "image") and task not in self.labels:
                raise UserError(
                    f"{what} does not name its classes: give its `labels` for '{task}'."
                )


class Mapped(EachOnce, Decoded):
    """Examples of one size; each is decoded only once if `remember` is given."""

    def __init__(self, info: Info, records: Any, mapping: TfdsMapping, remember: bool = False):
        EachOnce.__init__(self, remember)
        Decoded.__init__(self, info, records)
        self.mapping = mapping

    def __len__(self) -> int:
        return len(self.records)

    def decode(self, index: int) -> SourceExample:
        """The example of this number; UserError says which one it is about."""
        try:
            return self._arrays(self.records[index])
        except UserError as error:
            raise UserError(
                f"Example {index} of {self.info.name} ({self.info.split}): {error}"
            ) from error

    def _arrays(self, record: TfdsRecord) -> SourceExample:
        return convert(self.mapping, record, self.info.resolution)


def convert(mapping: TfdsMapping, record: TfdsRecord, size: Size) -> SourceExample:
    """The example of a decoded record, at this size; the image by the rules of `data.picture`.

    Raises UserError for a label whose shape breaks the convention, a class out of range, and
    an image of numbers without a known range.
    """
    try:
        image = picture.eight_bits(record[mapping.image])
    except picture.PictureError as error:
        raise UserError(f"the image {error}: correct the data or their mapping.") from error
    image = np.rint(resample.linear(image, size)).astype(np.uint8)
    maps = {name: resample.nearest(np.asarray(record[name]), size) for name in mapping.maps}
    resized = {**record, mapping.image: image, **maps}
    labels = {t: _checked(mapping, t, f(resized), size) for t, f in mapping.tasks.items()}
    return {"image": image} | labels


def _checked(mapping: TfdsMapping, task: str, label: np.ndarray, size: Size) -> np.ndarray:
    label, kind = np.asarray(label), mapping.kinds[task]
    shape = kind.shape(size)
    if label.shape != shape:
        raise UserError(
            f"the label of {task} has the shape {label.shape}, not {shape}: correct the mapping of "
            f"{mapping.name}."
        )
    if not kind.classes:
        return label.astype(kind.type)
    classes = 2 if kind.form == "binary" else mapping.labels[task].classes
    wrong = (label != kind.unknown) & ((label < 0) | (label >= classes))
    if wrong.any():
        raise UserError(
            f"{task} has the class {label[wrong].flat[0]}, but classes are 0 to {classes - 1} "
            f"({kind.unknown:g} unlabelled): the stored data are damaged, or the mapping of "
            f"{mapping.name} must be corrected."
        )
    return label.astype(kind.type)


def describe(mapping: TfdsMapping, split: str, resolution: Size) -> Info:
    """What a split contains."""
    return Info(
        name=mapping.name,
        split=split,
        resolution=resolution,
        tasks=tuple(mapping.tasks),
        labels=mapping.labels,
        kinds=mapping.kinds,
    )


def open_mapped(
    mapping: TfdsMapping,
    resolution: Size,
    split: str,
    given: Path | None = None,
    data_dir: Path | None = None,
    memory: int = 0,
) -> Mapped:
    """One split, downloaded and prepared by tfds first if it is not in `data_dir`.

    `given` is a folder with archives downloaded by hand. Decoded examples stay in memory if all of
    them take less than `memory` bytes. Raises UserError if the data cannot be obtained or the
    stored files are damaged.
    """
    from moezoo.data import tfds_store  # tensorflow-datasets costs a quarter of a second

    records = tfds_store.records(mapping, mapping.splits[split], given, data_dir)
    info = describe(mapping, split, resolution)
    first = Mapped(info, records, mapping)[0]
    size = sum(value.nbytes for value in first.values()) * len(records)
    return Mapped(info, records, mapping, remember=size < memory)
