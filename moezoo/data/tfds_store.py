"""A data set that tfds downloads and prepares on disk; any failure becomes one sentence."""

from __future__ import annotations

import contextlib
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import tensorflow_datasets as tfds
from requests import RequestException
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
from tensorflow_datasets.core.download.extractor import ExtractError
from tensorflow_datasets.core.download.util import DownloadError
from tensorflow_datasets.core.registered import DatasetNotFoundError

from moezoo.data import records as read
from moezoo.data import store
from moezoo.errors import UserError


class DataSet(Protocol):
    """What is known of a data set before it is there: for example, part of a `TfdsMapping`.

    name: in configurations.   dataset: tfds's name for it.   image: the feature that is the image.
    builder: (dataset, given folder, data_dir) -> builder, in place of tfds's own; None for tfds's.
    """

    @property
    def name(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def image(self) -> str: ...
    @property
    def builder(self) -> Callable[[str, Path | None, Path], Any] | None: ...


def records(
    mapping: DataSet, split: str, given: Path | None = None, data_dir: Path | None = None
) -> Any:
    """Random access to the decoded records of a split (a tfds expression), prepared if needed.

    Raises UserError if the data cannot be obtained, and if the stored files are damaged.
    """
    builder = prepare(mapping, given, data_dir or store.default_dir())
    return read.records(builder, split, mapping.image)


def prepare(mapping: DataSet, given: Path | None, data_dir: Path) -> Any:
    """The builder of a data set that is complete on disk; tfds makes it first if it is missing.

    Concurrent callers wait for the one that prepares. Raises UserError for a failed download, a
    damaged archive and a directory that cannot be used; partly written files are removed.
    """
    if given is not None and not given.is_dir():
        raise UserError(
            f"data.archive is '{given}', which is not a folder: name the folder with the "
            f"downloaded archives of {mapping.name}."
        )
    with store.explained(f"prepare {mapping.name} in", data_dir):
        return store.prepare(
            lambda: _builder(mapping, given, data_dir),
            lambda builder: _write(mapping, builder, given, data_dir),
            f"{mapping.name}: waiting for another process that is converting.",
        )


def _builder(mapping: DataSet, given: Path | None, data_dir: Path) -> Any:
    with store.quiet(), store.opening(data_dir / re.split("[/:]", mapping.dataset)[0]):
        if mapping.builder is not None:
            return mapping.builder(mapping.dataset, given, data_dir)
        try:
            return tfds.builder(mapping.dataset, data_dir=str(data_dir))
        except DatasetNotFoundError as error:
            raise UserError(
                f"tensorflow-datasets {tfds.__version__} has no data set '{mapping.dataset}': "
                f"correct the mapping of {mapping.name}, or install another version."
            ) from error


def _write(mapping: DataSet, builder: Any, given: Path | None, data_dir: Path) -> None:
    """Download, prepare and read back; only finished downloads survive a failure."""
    downloads = data_dir / "downloads" / builder.name
    how = tfds.download.DownloadConfig(manual_dir=given)
    try:
        with _explained(mapping):
            builder.download_and_prepare(
                download_dir=str(downloads), download_config=how, file_format="array_record"
            )
        store.check_complete(builder)
        store.write_sums(Path(builder.data_dir))
        shutil.rmtree(downloads, ignore_errors=True)
    finally:
        for unfinished in (downloads / "extracted", *downloads.glob("**/*.tmp.*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        for empty in (*sorted(downloads.glob("**/"), reverse=True), downloads.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()


@contextlib.contextmanager
def _explained(mapping: DataSet) -> Iterator[None]:
    """Turns anything that goes wrong between a server and the disk into one sentence."""
    try:
        yield
    except Exception as error:
        told = _sentence(mapping, error)
        if told is None:
            raise
        raise UserError(told) from error


def _sentence(mapping: DataSet, error: Exception) -> str | None:
    cause: BaseException = error
    while cause.__cause__ is not None:  # tfds puts whole records in front of the actual error
        cause = cause.__cause__
    reason, name = " ".join(str(cause).split())[:300], mapping.name
    if isinstance(cause, ImportError):
        return (
            f"tfds's own program for {name} needs a package that is not installed ({reason}): "
            "install it, or prepare the data set elsewhere with file_format='array_record' and "
            "copy its folder into the data directory."
        )
    if isinstance(error, NonMatchingChecksumError):
        what = reason.partition(", has wrong checksum")[0]
        return (
            f"{name} is damaged or a different version: its checksum is not the one that tfds "
            f"knows ({what}); download the archive again."
        )
    if isinstance(error, ExtractError | tarfile.TarError | EOFError):
        return f"An archive of {name} cannot be unpacked ({reason}): download it again."
    if isinstance(error, RequestException | DownloadError):
        reason = str(getattr(cause.args[0], "reason", reason)) if cause.args else reason
        return (
            f"Cannot download {name} ({reason}): try again later, or download it by hand and name "
            "its folder with --data.archive."
        )
    if isinstance(error, AssertionError):  # tfds's way to say that it cannot download it
        return f"{name} needs an archive in a folder named with --data.archive ({reason})."
    return None
