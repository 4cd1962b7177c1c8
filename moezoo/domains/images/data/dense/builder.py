"""The archives as ordinary tensorflow-datasets builders (ArrayRecord files, no TensorFlow).

A record keeps the archive's own bytes for the image and the normals, so it is small and exact.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from moezoo.domains.images.data.dense import archive, files, nyud, pascal
from moezoo.domains.images.data.dense.layout import ArchiveLayout
from moezoo.domains.images.data.rooms.workers import cores

LAYOUTS = {layout.name: layout for layout in (nyud.LAYOUT, pascal.LAYOUT)}
FORMAT = "v1"  # part of the cache's name: raise it when records change


@dataclass
class ArchiveConfig(tfds.core.BuilderConfig):
    """One archive; the name tells how many examples it lists, and which."""

    name: str = ""
    layout: ArchiveLayout = nyud.LAYOUT
    root: Path = field(default_factory=Path)
    ids: archive.Ids = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ids:
            listed = repr(sorted(self.ids.items())).encode()
            sizes = "_".join(f"{split}{len(names)}" for split, names in self.ids.items())
            self.name = f"{sizes}_{sha256(listed).hexdigest()[:8]}_{FORMAT}"


class Dense(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Images of any size with dense labels.

    semseg, parts: classes, 255 unlabelled. edge, saliency: 0/1. depth: float32 metres, 0 unknown.
    normals: uint8 v stands for 2 v / 255 - 1; unknown if `regions` is a kind of region without
    normals. regions: uint16 kinds of region. id: the archive's.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # else tfds 4.9.10 looks for checksums with a package it does not install
    builder_config: ArchiveConfig

    def __init__(self, **more: Any):
        self.running = ExitStack()  # stops the reading threads if writing ends early
        super().__init__(**more)

    def _info(self) -> tfds.core.DatasetInfo:
        layout = self.builder_config.layout
        raw, zipped = tfds.features.Encoding.BYTES, tfds.features.Encoding.ZLIB
        features: dict[str, Any] = {
            name: tfds.features.Image(shape=(None, None, 1), encoding_format="png")
            for name in class_maps(layout)
        }
        jpeg = layout.kinds["image"].suffix == ".jpg"
        features |= {
            "image": tfds.features.Image(
                shape=(None, None, 3), encoding_format="jpeg" if jpeg else "png"
            ),
            "normals": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "id": tfds.features.Text(),
        }
        if "depth" in layout.tasks:
            features["depth"] = tfds.features.Tensor(
                shape=(None, None), dtype=np.float32, encoding=raw
            )
        if "regions" in layout.kinds:
            features["regions"] = tfds.features.Tensor(
                shape=(None, None), dtype=np.uint16, encoding=zipped
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__ or "",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self.builder_config.ids}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        c = self.builder_config
        names = c.ids[split]
        largest = np.zeros(2, int)
        columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(f"converting {c.layout.title}, {split}", total=len(names))
            records = _in_order(c.layout, c.root, names)
            self.running.callback(records.close)
            for index, (size, item) in enumerate(records):
                largest = np.maximum(largest, size)
                yield index, item
                bar.advance(task)
        self.info.metadata[f"largest_{split}"] = largest.tolist()  # pyright: ignore


def class_maps(layout: ArchiveLayout) -> list[str]:
    """The labels that are stored as 8-bit pictures."""
    return [name for name, kind in layout.maps.items() if kind.type == np.uint8]


class Nyud(Dense):
    __doc__ = f"NYUD-v2. {Dense.__doc__}"


class Pascal(Dense):
    __doc__ = f"PASCAL-Context. {Dense.__doc__}"


BUILDERS: dict[str, type[Dense]] = {"nyud": Nyud, "pascal": Pascal}


def _in_order(
    layout: ArchiveLayout, root: Path, names: tuple[str, ...]
) -> Generator[tuple[tuple[int, int], dict[str, Any]]]:
    """Size and record of every example, read slightly ahead by several threads."""
    threads = cores()
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for name in names:
            waiting.append(pool.submit(record, layout, root, name))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def record(layout: ArchiveLayout, root: Path, name: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """Height and width, and the features of one example in the builder's form."""
    example, maps = layout.read(root, name), class_maps(layout)
    item: dict[str, Any] = {key: png(value) for key, value in example.items() if key in maps}
    item |= {key: example[key] for key in ("depth", "regions") if key in example}
    vectors = np.rint(np.clip(example["normals"] + 1, 0, 2) * 127.5).astype(np.uint8)
    item["image"] = _kept(layout.kinds["image"].path(root, name), example["image"])
    item["normals"] = _kept(layout.kinds["normals"].path(root, name), vectors)
    return example["image"].shape[:2], item | {"id": name}


def _kept(path: Path, values: np.ndarray) -> BytesIO:
    """The archive's own picture, or `values` re-encoded if it differs in size or colour type."""
    if files.size_of(path) == values.shape[:2] and files.is_plain(path):
        return BytesIO(path.read_bytes())
    return png(values)


def png(values: np.ndarray) -> BytesIO:
    """An array uint8 [H,W] or [H,W,3] as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG", compress_level=3)
    buffer.seek(0)
    return buffer
