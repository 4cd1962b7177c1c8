"""Data directories in an object store, through a copy of what is needed on this disk.

The files of records are read at random places, by programs that know no stores (array_record, the
audio cache). So a data directory `gs://bucket/data` stands for a local one, `stores/gs/bucket/data`
in the usual cache: a data set that is not there is fetched from the store where it has it whole,
else made here and brought there, so that the next machine only fetches it.

A data set converted from an archive is found in the store by the archive's own list of files: each
machine has to be given the archive, which is then not read.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from moezoo import storage
from moezoo.errors import UserError

STORES = "stores"


def cache() -> Path:
    """`~/.cache/moezoo`."""
    return Path.home() / ".cache" / "moezoo"


def default_dir() -> Path:
    """`$MOEZOO_DATA`, else `~/.cache/moezoo`; a local folder in any case."""
    return local_dir(os.environ.get("MOEZOO_DATA") or cache())


def local_dir(data_dir: Path | str) -> Path:
    """A data directory on this disk; for one in a store the local folder that it stands for."""
    if not storage.is_stored(data_dir):
        return Path(data_dir).expanduser()
    scheme, _, rest = str(storage.place(data_dir)).partition("://")
    return cache() / STORES / scheme / rest


def far(folder: Path) -> Path | None:
    """The folder in a store that a local one stands for; None for every other one."""
    root = cache() / STORES
    if not folder.is_relative_to(root) or len(folder.relative_to(root).parts) < 3:
        return None
    scheme, *rest = folder.relative_to(root).parts
    return storage.place(f"{scheme}://{'/'.join(rest)}")


def fetched(folder: Path) -> bool:
    """Whether a data set was in the store, and is here now; OSError where that cannot be known."""
    there = far(folder)
    if there is None or not there.exists():
        return False
    try:
        copy = storage.local(there)
    except UserError:  # it was not brought there to its end
        return False
    arriving = folder.with_name(f"incomplete.{folder.name}")
    shutil.rmtree(arriving, ignore_errors=True)
    shutil.copytree(copy, arriving)
    shutil.rmtree(copy, ignore_errors=True)
    arriving.rename(folder)
    return True


def brought(folder: Path) -> None:
    """Bring a data set that was made here to the store, if it belongs there.

    What does not work is said, and no more: the data are here.
    """
    there: Any = far(folder)
    if there is None:
        return
    try:
        with storage.written(there) as temporary:
            shutil.copytree(folder, temporary, dirs_exist_ok=True)
    except OSError as error:
        print(
            f"{there} could not be written ({error.strerror or error}): the data are on this disk "
            f"only, in {folder}.",
            file=sys.stderr,
        )
