"""A converted archive on disk."""

from __future__ import annotations

from pathlib import Path

from moezoo.data import store
from moezoo.data.dense import archive
from moezoo.data.dense.builder import BUILDERS, ArchiveConfig, Dense
from moezoo.data.dense.layout import SPLITS, Layout

GROWTH = 2.2  # records and the builder's temporary file, in sizes of the archive's files


def prepare(layout: Layout, given: Path | None, data_dir: Path) -> Dense:
    """The builder of a data set that is complete on disk; converts the archive first where needed.

    Without an archive, the only conversion of it in `data_dir` is taken. Concurrent callers wait
    for the one that converts. Raises UserError where archive or directory cannot be used; what was
    half written is removed.
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


def _converted_before(layout: Layout, data_dir: Path) -> Dense:
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
    """Bytes of the archive's files, from a sample of them."""
    names = [name for split in SPLITS for name in config.ids[split]]
    sample = names[:: max(1, len(names) // 50)]
    paths = [kind.path(config.root, n) for kind in config.layout.kinds.values() for n in sample]
    return sum(path.stat().st_size for path in paths) * len(names) / len(sample)
