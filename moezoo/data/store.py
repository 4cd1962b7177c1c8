"""Data sets that a tfds builder writes: made once, reused afterwards, never half written.

Differences (how a builder is opened, what it needs, what may go wrong on the way) are handled by
each data set; waiting, writing, reading back and cleaning are the same for all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tensorflow_datasets as tfds

from moezoo import plain_path, regular
from moezoo.data import mirror
from moezoo.data.mirror import default_dir
from moezoo.errors import UserError
from moezoo.folder_lock import alone_in

T = TypeVar("T")
INFO, SUMS = "dataset_info.json", "sums.json"  # tfds's, and ours beside it
MOST_JSON, MOST_BYTES = 100 * regular.MB, 1 << 62


def directory(data_dir: str | None) -> Path:
    """The local folder of data sets: that of the configuration, else `default_dir()`."""
    return mirror.local_dir(data_dir) if data_dir else default_dir()


def prepare(build: Callable[[], Any], write: Callable[[Any], None], waiting: str) -> Any:
    """The builder of a data set that is complete on disk; `write(builder)` makes it if needed.

    `build` opens the builder, and does so again once its files are there. Concurrent callers wait
    for the one that writes and print `waiting`. Whatever ends the writing, nothing half written
    stays. Raises what `build` and `write` raise; see `explained`.
    """
    builder = build()
    folder = Path(builder.data_dir)
    if folder.exists():
        return builder
    plain_path.check(folder, "--data.data-dir or MOEZOO_DATA")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(folder.parent, waiting):
        if not folder.exists():
            for leftover in folder.parent.glob("incomplete.*"):  # from a process that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            if not mirror.fetched(folder):
                try:
                    with quiet():
                        write(builder)
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
                mirror.brought(folder)
    return build()


def generate(builder: Any, data_dir: Path) -> None:
    """Let one of this project's builders write its records; then ends its `running`.

    Raises OSError if the records are incomplete.
    """
    try:
        with builder.running:
            builder.download_and_prepare(file_format="array_record")
        check_complete(builder)
        write_sums(Path(builder.data_dir))
    finally:
        for empty in ("downloads/extracted", "downloads"):  # tfds makes them unasked
            with contextlib.suppress(OSError):
                (data_dir / empty).rmdir()


class DamagedStore(UserError):
    """Stored files that cannot be used; they are in `folder`."""

    def __init__(self, folder: Path, why: str = ""):
        self.folder, self.state = folder, _state(folder)
        reason = f" ({' '.join(why.split())[:300]})" if why else ""
        super().__init__(
            f"The data set in '{folder}' is damaged{reason}; delete that folder, then run again."
        )


def damaged(builder: Any, why: str = "") -> DamagedStore:
    """The error for a builder's stored files that cannot be used."""
    return DamagedStore(Path(builder.data_dir), why)


@contextlib.contextmanager
def opening(folder: Path) -> Iterator[None]:
    """Open the builder whose files are in or below `folder`, if they are there already.

    Raises Damaged if one is not a regular file or not as it was written, and for any error of a
    reader. Errors of the operating system pass.
    """
    there = folder.is_dir()
    for place in {path.parent for name in (INFO, SUMS) for path in folder.rglob(name)}:
        if not any(part.startswith("incomplete") for part in place.parts):
            _check_sums(place)
    try:
        yield
    except (UserError, OSError, ImportError):
        raise
    except Exception as error:  # the reader raises many kinds for damaged files
        if not there:
            raise
        raise DamagedStore(folder, f"{type(error).__name__}: {error}") from error


def renewed(opened: Callable[[], T], title: str) -> T:
    """`opened()`, and once more after removing damaged files: for data that are made here."""
    try:
        return opened()
    except DamagedStore as error:
        print(f"{title}: {error.folder} is damaged; it is made again.", file=sys.stderr)
        with explained("remove the damaged data in", error.folder):
            _remove(error)
    return opened()


def _remove(damage: DamagedStore) -> None:
    """Unless another process has done so, and made them again, in the meantime."""
    folder = damage.folder
    with alone_in(folder.parent, f"{folder}: waiting for another process."):
        if damage.state is not None and _state(folder) == damage.state:
            away = folder.with_name(f"incomplete.{folder.name}")
            shutil.rmtree(away, ignore_errors=True)
            folder.rename(away)
            shutil.rmtree(away, ignore_errors=True)


def _state(folder: Path) -> tuple[int, int] | None:
    try:
        about = folder.stat()
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns


def write_sums(folder: Path) -> None:
    """Write what `opening` compares: the digests of small files, the sizes of records."""
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    sums = {path.name: _sum(path) for path in files}
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n")


def _sum(path: Path) -> str | int:
    if path.suffix == ".json":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return path.stat().st_size


def _check_sums(folder: Path) -> None:
    for path in folder.iterdir():
        wrong = regular.trouble(path, MOST_BYTES if path.suffix != ".json" else MOST_JSON)
        if wrong is not None:
            raise DamagedStore(folder, f"{path.name} {wrong}")
    if not (folder / SUMS).exists():  # from an older version, or prepared elsewhere
        return
    try:
        for name, value in dict(json.loads((folder / SUMS).read_text())).items():
            if _sum(folder / name) != value:
                raise DamagedStore(folder, f"{name} is not as it was written")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DamagedStore(folder, f"{SUMS}: {error}") from error


def check_complete(builder: Any) -> None:
    """Read the ends back, because the record writer does not report every failed write.

    Raises OSError.
    """
    for split in builder.info.splits:
        try:
            complete = whole(builder, split, builder.as_data_source(split=split))
        except (ValueError, RuntimeError, IndexError):
            complete = False
        if not complete:
            raise OSError(f"the {split} records are incomplete (is the disk full?)")


def whole(builder: Any, split: str, found: Any) -> bool:
    """Whether the records of a split (a tfds expression) are as many as they should be."""
    count = builder.info.splits[split].num_examples
    return len(found) == count > 0 and bool(found[0]) and bool(found[count - 1])


def check_space(needed: float, folder: Path) -> None:
    """Raise OSError if the disk of `folder` has fewer free bytes than writing needs."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            f"it needs {needed / 1e6:.0f} MB meanwhile, but only {free / 1e6:.0f} MB are free"
        )


@contextlib.contextmanager
def explained(task: str, data_dir: Path) -> Iterator[None]:
    """Turns system errors inside into one sentence that begins with "Cannot <task> '<data_dir>'".

    Raises UserError for them; every other exception passes.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = disk_trouble(error)
        if reason is None:
            raise
        raise UserError(
            f"Cannot {task} '{data_dir}': {reason}; choose another directory with --data.data-dir "
            "or the environment variable MOEZOO_DATA."
        ) from error


def disk_trouble(error: BaseException) -> str | None:
    """The system's message, if it refused a file operation; the record writer only quotes it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    told = [os.strerror(n) for n in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO)]
    return next((words for words in told if words in str(error)), None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the builder's own messages and bars; whatever is still shown goes to stderr."""
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3")]  # tfds, repeated attempts
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
