"""A converted archive on disk: made once, reused afterwards, never half written."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from moezoo.data.dense import archive
from moezoo.data.dense.builder import BUILDERS, ArchiveConfig, Dense
from moezoo.data.dense.layout import SPLITS, Layout
from moezoo.data.rooms.store import _disk_trouble, quiet
from moezoo.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; there the final rename alone decides
    fcntl = None

GROWTH = 2.2  # records and the builder's temporary file, in sizes of the archive's files


def prepare(layout: Layout, given: Path | None, data_dir: Path) -> Dense:
    """The builder of a data set that is complete on disk; converts the archive first where needed.

    Without an archive, the only conversion of it in `data_dir` is taken. Concurrent callers wait
    for the one that converts. Raises UserError where archive or directory cannot be used; what was
    half written is removed.
    """
    try:
        root = archive.find(layout, given, data_dir)
        if root is None:
            return _converted_before(layout, data_dir)
        ids = archive.read_ids(layout, root)
        config = ArchiveConfig(layout=layout, root=root, ids=ids)
        folder = Path(_builder(config, data_dir).data_dir)
        if not folder.exists():
            archive.check(layout, root, ids)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent, layout.name):
                _convert(config, data_dir)
        return _builder(config, data_dir)
    except (OSError, RuntimeError) as error:
        reason = _disk_trouble(error)
        if reason is None:
            raise
        raise UserError(
            f"Cannot convert {layout.title} into '{data_dir}': {reason}; choose another directory "
            "with --data.data-dir or the environment variable MOEZOO_DATA."
        ) from error


def _builder(config: ArchiveConfig, data_dir: Path) -> Dense:
    with quiet():
        return BUILDERS[config.layout.name](config=config, data_dir=str(data_dir))


def _converted_before(layout: Layout, data_dir: Path) -> Dense:
    version = str(Dense.VERSION)
    found = sorted(p.parent.name for p in (data_dir / layout.name).glob(f"*/{version}"))
    if len(found) != 1:
        raise archive.missing(layout, data_dir)
    return _builder(ArchiveConfig(name=found[0], layout=layout), data_dir)


def _convert(config: ArchiveConfig, data_dir: Path) -> None:
    """Write the data set unless another process has done it while this one waited."""
    builder = _builder(config, data_dir)
    final = Path(builder.data_dir)
    if final.exists():
        return
    for leftover in final.parent.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _check_space(config, final.parent)
    with quiet():
        try:
            with builder.running:
                builder.download_and_prepare(file_format="array_record")
            _check_complete(builder)
        except BaseException:
            shutil.rmtree(final, ignore_errors=True)
            raise
        finally:
            for empty in ("downloads/extracted", "downloads"):  # the builder makes them unasked
                with contextlib.suppress(OSError):
                    (data_dir / empty).rmdir()


def _check_space(config: ArchiveConfig, folder: Path) -> None:
    """Compare the disk's free space with a sample of the archive's files."""
    names = [name for split in SPLITS for name in config.ids[split]]
    sample = names[:: max(1, len(names) // 50)]
    paths = [kind.path(config.root, n) for kind in config.layout.kinds.values() for n in sample]
    size = sum(path.stat().st_size for path in paths) * len(names) / len(sample)
    free = shutil.disk_usage(folder).free
    if free < GROWTH * size:
        raise OSError(f"it needs {GROWTH * size / 1e6:.0f} MB, only {free / 1e6:.0f} MB are free")


def _check_complete(builder: Dense) -> None:
    """The record writer does not report every failed write, so read the ends back."""
    for split, names in builder.builder_config.ids.items():
        try:
            source = builder.records(split)
            ends = (source[0], source[len(names) - 1]) if len(source) == len(names) else (None,)
            complete = all(ends)
        except (ValueError, RuntimeError, IndexError):
            complete = False
        if not complete:
            raise OSError(f"the {split} records are incomplete (is the disk full?)")


@contextlib.contextmanager
def _lock(folder: Path, name: str) -> Iterator[None]:
    """Let one process at a time work on a folder; the system frees the lock when it dies."""
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"{name}: waiting for another process that is converting.", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
