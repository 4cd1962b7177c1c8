"""The rendered data set on disk: made once, reused afterwards, never half written."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds

from moezoo.data.rooms.builder import Rooms, RoomsConfig
from moezoo.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock; there the final rename alone decides
    fcntl = None

BYTES_PER_PIXEL = 30  # on disk while writing: final records and the builder's temporary file


def prepare(config: RoomsConfig, data_dir: Path) -> Rooms:
    """The builder of a data set that is complete on disk; renders it first where it is missing.

    Concurrent callers wait for the one that renders. Raises UserError when the directory cannot be
    written or the disk is full; what was half written is removed.
    """
    try:
        with quiet():
            builder = Rooms(config=config, data_dir=str(data_dir))
        folder = Path(builder.data_dir)
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _lock(folder.parent):
                builder = _render(config, data_dir)
        return builder
    except (OSError, RuntimeError) as error:
        reason = _disk_trouble(error)
        if reason is None:
            raise
        raise UserError(
            f"Cannot store the rooms data set in '{data_dir}': {reason}; "
            "choose another directory with --data.data-dir or the environment variable MOEZOO_DATA."
        ) from error


def _disk_trouble(error: BaseException) -> str | None:
    """What the system said, if it refused a file operation; the record writer only quotes it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    told = [os.strerror(n) for n in (errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO)]
    return next((words for words in told if words in str(error)), None)


def _render(config: RoomsConfig, data_dir: Path) -> Rooms:
    """Write the data set unless another process has done it while this one waited."""
    with quiet():
        builder = Rooms(config=config, data_dir=str(data_dir))
        final = Path(builder.data_dir)
        if final.exists():
            return builder
        for leftover in final.parent.glob("incomplete.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        _check_space(config, final.parent)
        try:
            with builder.running:
                builder.download_and_prepare(file_format="array_record")
            _check_complete(builder, config)
        except BaseException:
            shutil.rmtree(final, ignore_errors=True)
            raise
        finally:
            for empty in ("downloads/extracted", "downloads"):  # the builder makes them unasked
                with contextlib.suppress(OSError):
                    (data_dir / empty).rmdir()
    return builder


def _check_space(config: RoomsConfig, folder: Path) -> None:
    needed = BYTES_PER_PIXEL * config.height * config.width * (config.train + config.test)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"it needs {needed / 1e6:.0f} MB, only {free / 1e6:.0f} MB are free")


def _check_complete(builder: Rooms, config: RoomsConfig) -> None:
    """The record writer does not report every failed write, so read the ends back."""
    for split, count in (("train", config.train), ("test", config.test)):
        try:
            source = builder.records(split)
            complete = len(source) == count and bool(source[0]) and bool(source[count - 1])
        except (ValueError, RuntimeError, IndexError):
            complete = False
        if not complete:
            raise OSError(f"the {split} records are incomplete (is the disk full?)")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a folder; the system frees the lock when it dies."""
    with open(folder / ".lock", "w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("rooms: waiting for another process that is rendering.", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the builder's own messages and bars; rendering shows its own bar on stderr."""
    logger = logging.getLogger("absl")  # where the builder and its decoders report
    level = logger.level
    logger.setLevel(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def default_dir() -> Path:
    """`$MOEZOO_DATA`, else `~/.cache/moezoo`."""
    return Path(os.environ.get("MOEZOO_DATA") or Path.home() / ".cache" / "moezoo")
