"""One process at a time works on a folder; others wait for it.

For work that takes moments, or whose result the others want, too: whoever waits goes on when it is
done. A run's folder is another matter, nobody waits for it (`train.lock`). The lock is on the file
`.lock` of the folder, of each open file by itself, so that threads wait for each other as well, and
the system gives it back when its process is gone. Needs the standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def alone_in(folder: Path, waiting: str) -> Iterator[None]:
    """The block runs when no other process or thread is in one for this folder.

    waiting: printed to stderr by who has to wait. Where there are no locks (Windows, some network
    storage) the block runs at once. Raises OSError where the folder takes no file.
    """
    with open(folder / NAME, "w") as file:
        if fcntl is not None:
            _take(fcntl, file, waiting)
        yield


def _take(locks: Any, file: IO[str], waiting: str) -> None:
    try:
        locks.flock(file, locks.LOCK_EX | locks.LOCK_NB)
    except BlockingIOError:
        print(waiting, file=sys.stderr)
        locks.flock(file, locks.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
