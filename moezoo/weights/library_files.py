"""The files of a library of adapters: a member's arrays, and changes that one writer makes at once.

A change first makes everything that it writes, then writes the files of members, and then the
manifest: a reader finds every file that a manifest names, and a change that fails leaves nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from moezoo.errors import UserError
from moezoo.files import check_writable, failure, put_atomically
from moezoo.folder_lock import alone_in
from moezoo.weights.library_manifest import MANIFEST, read_manifest
from moezoo.weights.tensor_file import Planned, write

MEMBERS = "members"
STALE = 3600.0  # seconds; no file of a library takes as long to write
Arrays = dict[str, np.ndarray]


def member_file(folder: Path, name: str) -> Path:
    """Where the arrays of a member lie."""
    return folder / MEMBERS / f"{name}.safetensors"


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """The block changes a library while nobody else does.

    What killed writers left is cleared away. Raises UserError where the folder or that of its
    members takes no files, before anything is changed.
    """
    with contextlib.ExitStack() as stack:
        try:
            waiting = f"{folder}: waiting for another process that changes it."
            stack.enter_context(alone_in(folder, waiting))
        except OSError as error:
            raise failure("write to", folder, error) from error
        for place in (folder, folder / MEMBERS):
            _clear(place)
            check_writable(place)
        yield


def _clear(place: Path) -> None:
    """Delete unfinished files that nobody writes any more, also where storage has no locks."""
    for path in place.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                path.unlink()


@contextlib.contextmanager
def members_written(folder: Path, arrays: Mapping[str, Arrays]) -> Iterator[None]:
    """Write files of new members, by name, for the time of the block; they stay if it ends well.

    Raises UserError where the disk does not take them.
    """
    try:
        for name, own in arrays.items():
            write_arrays(member_file(folder, name), own)
        yield
    except BaseException:
        with contextlib.suppress(UserError, OSError):
            # An interrupt may come when the manifest is there already.
            named = {member.name for member in read_manifest(folder / MANIFEST).members}
            for name in arrays.keys() - named:
                member_file(folder, name).unlink(missing_ok=True)
        raise


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Put a file of arrays in a place, all of it or nothing; UserError where the disk refuses."""
    planned = {n: Planned(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}
    put_atomically(path, lambda temporary: write(temporary, planned))


def delete_members(folder: Path, names: tuple[str, ...]) -> None:
    """Delete the files of members that the manifest does not name any more.

    Raises UserError for those that stay.
    """
    left: list[tuple[Path, OSError]] = []
    for name in names:
        try:
            member_file(folder, name).unlink(missing_ok=True)
        except OSError as error:
            left.append((member_file(folder, name), error))
    if left:
        path, error = left[0]
        raise UserError(
            f"{', '.join(names)} left the library {folder}, but {path} could not be deleted "
            f"({error.strerror or error}): delete it yourself."
        ) from error
