"""One run at a time in a folder: a lock that ends with its process, however that ends.

The lock is POSIX's on the file `.lock` of the run's folder (`fcntl.lockf`). The kernel gives it
back when the process is gone, so that a killed run never stands in the way of the next. Storage
that hosts share keeps it between hosts where it has locks: NFS, CephFS, Lustre mounted with
`flock`. Where storage knows no locks (object stores mounted as folders, Lustre without that
option) a run goes on without one and says so; then, and where a mount keeps locks to its own host,
it is up to the user to start a run once. So that such a case shows, the file names the process
that wrote it, and a run that takes it over from another host's, which did not end by itself, says
so, too. In an object store the lock is a lease (`store_lock`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from moezoo import storage
from moezoo.errors import UserError
from moezoo.files import failure
from moezoo.folder_lock import NAME, NO_LOCKS
from moezoo.train import store_lock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TAKEN = (errno.EACCES, errno.EAGAIN)
_held: set[Path] = set()  # by this process, which the kernel would let in twice


@contextlib.contextmanager
def locked(directory: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Keep every other process out of a run's folder for the time of the block.

    Raises UserError naming the process that has it, and where the folder cannot be written.
    """
    if storage.is_stored(directory):
        with store_lock.leased(directory, say):
            yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        path = (directory / NAME).resolve()
        if path in _held:
            raise UserError(_refusal(directory, {"process": os.getpid()}))
        file = open(path, "a+")
    except OSError as error:
        raise failure("write to", directory, error) from error
    with file:
        _take(file, directory, say)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            with contextlib.suppress(OSError):  # a full disk; the lock ends all the same
                file.truncate(0)


def _take(file: IO[str], directory: Path, say: Callable[[str], None]) -> None:
    """Lock the file and write this process's name into it."""
    holder = _holder(file)
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in TAKEN:
            raise UserError(_refusal(directory, holder)) from error
        if error.errno not in NO_LOCKS:
            raise failure("lock", directory, error) from error
        say(f"The storage of {directory} has no locks: do not start this run twice.")
    host = socket.gethostname()
    if holder.get("host", host) != host:
        say(
            f"Process {holder.get('process')} on {holder['host']} had {directory} before and did "
            "not end by itself; if it still runs, stop one of the two."
        )
    with contextlib.suppress(OSError):  # a full disk; then the lock has no name
        file.truncate(0)
        file.write(json.dumps({"process": os.getpid(), "host": host}))
        file.flush()


def _holder(file: IO[str]) -> dict[str, Any]:
    try:
        file.seek(0)
        content = json.loads(file.read(1000))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _refusal(directory: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder['process']}" if "process" in holder else "another process"
    where = f" on {holder['host']}" if "host" in holder else ""
    return (
        f"{directory} is in use by {who}{where}: wait until that run has ended or stop it, or "
        "choose another --name."
    )
