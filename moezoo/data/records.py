"""Records of a stored split by index, their pictures decoded by the rules of `data.picture`.

tfds decodes pictures in whatever format the bytes have (PostScript starts a program), wraps 16
bits into 8, takes CMYK for RGB with alpha, and returns the indices of a palette as colours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from moezoo.data import picture, store
from moezoo.data.picture import PictureError


class Records:
    """Decoded records. `image` is the feature whose picture is read as colours, whatever its form.

    Other pictures give the stored numbers, [H,W,1] or, with three channels, colours. Raises
    store.Damaged for records that cannot be read.
    """

    def __init__(self, builder: Any, split: str, image: str = "image"):
        self.builder, self.split, self.image = builder, split, image
        self.features = getattr(builder.info, "features", None)
        skipped = {} if self.features is None else {"decoders": _undecoded(self.features)}
        self.found = builder.as_data_source(split=split, **skipped)

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> Any:
        try:
            record = self.found[index]
        except Exception as error:  # readers raise many kinds for damaged files
            raise store.damaged(self.builder, f"record {index} of {self.split}") from error
        try:
            return record if self.features is None else self._decoded(self.features, record)
        except PictureError as error:
            why = f"record {index} of {self.split}: {error}"
            raise store.damaged(self.builder, why) from error

    def _decoded(self, feature: Any, value: Any, name: str = "") -> Any:
        if isinstance(feature, tfds.features.Image):
            try:
                return picture.rgb(value) if name == self.image else numbers(feature, value)
            except PictureError as error:
                raise PictureError(f"the picture '{name}' {error}") from error
        if isinstance(feature, tfds.features.FeaturesDict):
            return {key: self._decoded(feature[key], v, key) for key, v in value.items()}
        return value


def records(builder: Any, split: str, image: str = "image") -> Records:
    """Random access to the decoded records of a split on disk (a tfds expression).

    Raises store.Damaged if the stored files are damaged.
    """
    try:
        with store.quiet():
            found = Records(builder, split, image)
            whole = store.whole(builder, split, found) and _all_there(builder, split)
    except store.DamagedStore:
        raise
    except Exception as error:  # the reader raises many kinds for damaged files
        raise store.damaged(builder) from error
    if not whole:
        raise store.damaged(builder)
    return found


def numbers(feature: Any, stored: bytes) -> np.ndarray:
    """A picture of a tfds feature as numbers of the feature's type. Raises PictureError."""
    channels, kind = feature.shape[-1], np.dtype(feature.np_dtype)
    if (channels, kind) == (3, np.uint8):
        return picture.rgb(stored)
    values = picture.stored(stored)
    values = values[..., None] if values.ndim == 2 else values
    if kind == np.float32 and values.shape[2] == 4:  # tfds stores their bytes as channels
        return values.view(np.float32)
    if values.shape[2] != channels or values.dtype.itemsize > kind.itemsize or kind.kind != "u":
        found = f"{values.shape[2]} channels of {values.dtype.name}"
        raise PictureError(f"has {found}, but the data set says {channels} of {kind.name}")
    return values.astype(kind)


def _undecoded(feature: Any) -> Any:
    """Decoders that leave all pictures as bytes, in tfds's form; None if there are no pictures."""
    if isinstance(feature, tfds.features.Image):
        return tfds.decode.SkipDecoding()
    inner = getattr(feature, "feature", feature)  # of a sequence, whose pictures stay bytes
    if isinstance(inner, tfds.features.FeaturesDict | Mapping):
        found = {key: _undecoded(part) for key, part in inner.items()}
        return {key: part for key, part in found.items() if part is not None} or None
    return _undecoded(inner) if inner is not feature else None


def _all_there(builder: Any, split: str) -> bool:
    """Whether the files have as many records as the description, the only thing tfds counts."""
    splits = builder.info.splits
    for name in set(re.findall(r"\w+", split)) & set(splits):
        about = splits[name]
        if not hasattr(about, "shard_lengths") or "array_record" not in str(about.filepaths[0]):
            continue
        for path, count in zip(about.filepaths, about.shard_lengths, strict=True):
            reader = array_record_module.ArrayRecordReader(str(path))
            held = reader.num_records()
            reader.close()
            if held != count:
                return False
    return True
