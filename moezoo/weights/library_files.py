"""The files of a library of adapters: a member's arrays, and changes that one writer makes at once.

A change first makes everything that it writes, then writes the files of members, and then the
manifest: a reader finds every file that a manifest names, and a change that fails leaves nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from moezoo.errors import UserError
from moezoo.folder_lock import alone_in
from moezoo.weights.library_manifest import MANIFEST, read_manifest
from moezoo.weights.tensor_file import Planned, write

MEMBERS = "members"
STALE = 3600.0  # seconds; no file of a library takes as long to write
ADVICE = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space below your quota",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.EROFS: "it is mounted read-only",
    errno.EFBIG: "it passes the size limit for files",
}
Arrays = dict[str, np.ndarray]


def failure(action: str, path: Path, error: OSError) -> UserError:
    """The UserError for a failed operation on a library's file, with what to do about it."""
    advice = ADVICE.get(error.errno or 0, "check the path and the disk")
    return UserError(f"Could not {action} {path}: {error.strerror or error}; {advice}.")


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
        place = folder
        try:
            waiting = f"{folder}: waiting for another process that changes it."
            stack.enter_context(alone_in(folder, waiting))
            for place in (folder, folder / MEMBERS):
                _clear(place)
                probe = place / f".{uuid.uuid4().hex[:8]}.tmp"
                probe.touch()
                probe.unlink()
        except OSError as error:
            raise failure("write to", place, error) from error
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
    _replace(path, lambda temporary: write(temporary, planned))


def write_text(path: Path, content: str) -> None:
    """Put a text in a file's place, all of it or nothing; UserError where the disk refuses."""
    _replace(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def _replace(path: Path, fill: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.tmp")
    try:
        fill(temporary)
        with open(temporary, "r+b") as file:  # a name without its bytes would outlive a crash
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise failure("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename
            temporary.unlink()


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
