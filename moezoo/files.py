"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from moezoo import storage
from moezoo.errors import UserError


def failure(action: str, path: Path | str, error: OSError) -> UserError:
    """The UserError for a failed file operation, with what to do about it."""
    advice = {
        errno.ENOSPC: "free space on that disk or choose another folder",
        errno.EDQUOT: "free space below your quota or choose another folder",
        errno.EACCES: "check the permissions or choose another folder",
        errno.EPERM: "check the permissions or choose another folder",
        errno.EROFS: "it is mounted read-only; choose another folder",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a part of that path is a file; choose another folder",
        errno.EEXIST: "a part of that path is a file; choose another folder",
        errno.EFBIG: "it passes the size limit for files; raise the limit or choose another folder",
    }
    reason = error.strerror or str(error)
    hint = advice.get(error.errno or 0, "check the path and the disk")
    if storage.is_stored(path):
        hint = "check the bucket's name, your permissions and the network"
    return UserError(f"Could not {action} {path}: {reason}; {hint}.")


def write_atomically(path: Path | str, content: bytes | str) -> None:
    """Write a file under a temporary name beside it, then rename: all of it appears, or nothing.

    Makes the folder where it is missing. Raises UserError where the disk does not take it; what
    stood at `path` before is then untouched.
    """
    path = storage.place(path)
    _check_names_a_file(path)
    data = content.encode() if isinstance(content, str) else content
    if storage.is_stored(path):  # where an object appears whole
        try:
            path.write_bytes(data)
        except OSError as error:
            raise failure("write", path, error) from error
        return
    put_atomically(path, lambda temporary: temporary.write_bytes(data))


def put_atomically(path: Path, fill: Callable[[Path], object]) -> None:
    """Have `fill` write a temporary file beside a path on a disk, then rename it.

    Makes the folder and raises as `write_atomically`.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        with open(temporary, "r+b") as file:  # a name without its bytes would outlive a crash
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise failure("write", path, error) from error
    finally:
        with contextlib.suppress(OSError):  # gone after the rename, left over after a failure
            temporary.unlink()


def check_file(path: Path | str | None) -> None:
    """Prove, before the work whose result goes there, that a file can be written at `path`.

    None is no file. Raises UserError for a folder, and where the file's folder takes none.
    """
    if path is not None:
        _check_names_a_file(storage.place(path))
        check_writable(storage.place(path).absolute().parent)


def _check_names_a_file(path: Path) -> None:
    try:
        folder = not path.name or path.is_dir()
    except OSError as error:  # too long
        raise failure("write", path, error) from error
    if folder:
        raise UserError(f"Could not write {path}: it is a folder; name a file in it.")


def check_writable(folder: Path | str) -> None:
    """Make `folder` and prove that a file can be written there; UserError otherwise."""
    folder = storage.place(folder)
    probe = folder / f".probe.{uuid.uuid4().hex[:8]}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"moezoo")
    except OSError as error:
        raise failure("write to", folder, error) from error
    finally:
        with contextlib.suppress(OSError):  # a full disk takes the name and not the content
            probe.unlink()
