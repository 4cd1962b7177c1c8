"""Opening a converted archive as a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo.data import source, store
from moezoo.data.dense import files
from moezoo.data.dense.builder import LAYOUTS
from moezoo.data.dense.layout import Layout
from moezoo.data.dense.regions import HAS_NORMALS
from moezoo.data.dense.store import prepare
from moezoo.data.records import records
from moezoo.data.source import Arrays, Decoded, Example, Info
from moezoo.errors import UserError


class Benchmark(Decoded):
    """Examples of the size of their images; `info.resolution` is that of batches."""

    def _arrays(self, record: Mapping[str, Any]) -> Example:
        example = super()._arrays(record)
        normals = files.directions(example["normals"])
        if "regions" in record:
            normals[~HAS_NORMALS[record["regions"]]] = 0
        return example | {"normals": normals}


def describe(layout: Layout, split: str, resolution: tuple[int, int]) -> Info:
    """What a split of an archive holds."""
    return Info(
        name=layout.name,
        split=split,
        resolution=resolution,
        tasks=layout.tasks,
        labels=layout.labels,
        foreground_only=layout.foreground_only,
        extras=layout.extras,
        kinds=layout.maps,
    )


def open_benchmark(
    name: str,
    resolution: tuple[int, int],
    split: str,
    given: Path | None = None,
    data_dir: Path | None = None,
    cropped: bool = False,
) -> Benchmark:
    """One split of NYUD-v2 or PASCAL-Context, converted first if it is not in `data_dir`.

    `given` is the archive's folder. Raises UserError where the archive cannot be used, where the
    stored files are damaged, and for images larger than the resolution that nobody crops.
    """
    layout = LAYOUTS[name]
    builder = prepare(layout, given, data_dir or store.default_dir())
    found = records(builder, split)
    largest = (builder.info.metadata or {}).get(f"largest_{split}")
    if largest is None:
        raise store.damaged(builder)
    if not cropped and (largest[0] > resolution[0] or largest[1] > resolution[1]):
        raise UserError(
            f"{layout.title} has {split} images up to {largest[0]} x {largest[1]}, larger than "
            f"data.resolution {resolution[0]} x {resolution[1]}: they are padded, never shrunk, so "
            "set data.resolution to at least that."
        )
    return Benchmark(describe(layout, split, resolution), found)


def blank(name: str, split: str, resolution: tuple[int, int]) -> Arrays:
    """One black example in the form of an archive's, which need not be there."""
    return source.blank(describe(LAYOUTS[name], split, resolution))
