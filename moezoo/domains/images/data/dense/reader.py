"""Opening a converted archive, on disk, as a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moezoo.data import source, store
from moezoo.data.records import records
from moezoo.data.source import ArraySource, Decoded, Info, SourceExample
from moezoo.domains.images.data.dense import archive, files
from moezoo.domains.images.data.dense.builder import BUILDERS, LAYOUTS, ArchiveConfig, Dense
from moezoo.domains.images.data.dense.layout import SPLITS, ArchiveLayout
from moezoo.domains.images.data.dense.pascal import HAS_NORMALS
from moezoo.errors import UserError

GROWTH = 2.2  # records and the builder's temporary file, relative to the archive's files


def prepare(layout: ArchiveLayout, given: Path | None, data_dir: Path) -> Dense:
    """The builder of a data set that is complete on disk; converts the archive first if needed.

    Without an archive, its only conversion in `data_dir` is used. Concurrent callers wait for the
    one that converts. Raises UserError if archive or directory cannot be used; partly written files
    are removed.
    """
    with store.explained(f"convert {layout.title} into", data_dir):
        root = archive.find(layout, given, data_dir)
        if root is None:
            return _converted_before(layout, data_dir)
        ids = archive.read_ids(layout, root)
        return _convert(ArchiveConfig(layout=layout, root=root, ids=ids), data_dir)


def _builder(config: ArchiveConfig, data_dir: Path) -> Dense:
    kind = BUILDERS[config.layout.name]
    with store.quiet(), store.opening(data_dir / kind.name / config.name / str(kind.VERSION)):
        return kind(config=config, data_dir=str(data_dir))


def _converted_before(layout: ArchiveLayout, data_dir: Path) -> Dense:
    version = str(Dense.VERSION)
    found = sorted(p.parent.name for p in (data_dir / layout.name).glob(f"*/{version}"))
    if len(found) != 1:
        raise archive.missing(layout, data_dir)
    return _builder(ArchiveConfig(name=found[0], layout=layout), data_dir)


def _convert(config: ArchiveConfig, data_dir: Path) -> Dense:
    def build() -> Dense:
        builder = _builder(config, data_dir)
        if not Path(builder.data_dir).exists():  # before any folder is made
            archive.check(config.layout, config.root, config.ids)
        return builder

    def write(builder: Dense) -> None:
        store.check_space(GROWTH * _size(config), Path(builder.data_dir).parent)
        store.generate(builder, data_dir)

    waiting = f"{config.layout.name}: waiting for another process that is converting."
    return store.prepare(build, write, waiting)


def _size(config: ArchiveConfig) -> float:
    """Bytes of the archive's files, estimated from a sample."""
    names = [name for split in SPLITS for name in config.ids[split]]
    sample = names[:: max(1, len(names) // 50)]
    paths = [kind.path(config.root, n) for kind in config.layout.kinds.values() for n in sample]
    return sum(path.stat().st_size for path in paths) * len(names) / len(sample)


class Benchmark(Decoded):
    """Examples at the size of their images; `info.resolution` is the size of batches."""

    def _arrays(self, record: Mapping[str, Any]) -> SourceExample:
        example = super()._arrays(record)
        normals = files.directions(example["normals"])
        if "regions" in record:
            normals[~HAS_NORMALS[record["regions"]]] = 0
        return example | {"normals": normals}


def describe(layout: ArchiveLayout, split: str, resolution: tuple[int, int]) -> Info:
    """What a split of an archive contains."""
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

    `given` is the archive's folder. Raises UserError if the archive cannot be used, if stored files
    are damaged, and for images larger than the resolution unless `cropped`.
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


def blank(name: str, split: str, resolution: tuple[int, int]) -> ArraySource:
    """One black example in the form of an archive's, which need not be there."""
    return source.blank(describe(LAYOUTS[name], split, resolution))
