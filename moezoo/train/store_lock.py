"""One run at a time in a folder of an object store, which knows no locks: a lease that is renewed.

The object `.lock` of the run's folder names who has it. Google Cloud Storage writes an object only
if it is still the version that the writer has read (`if_generation_match`), so of two that want the
lease one gets it. Its holder writes the object again every `BEAT` seconds; a lease that was not
renewed for `LEASE` seconds, measured by the one that waits, belongs to nobody: no clocks are
compared. A holder whose lease was taken (it was asleep for longer than that) ends at once; a
checkpoint that it was writing is finished or fails, and its checksums tell which.

S3 has other conditions, which are not used here: a run there goes on without a lock and says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moezoo.errors import UserError
from moezoo.files import failure

NAME = ".lock"
BEAT, LEASE, LOOK = 10.0, 40.0, 2.0  # seconds
Say = Callable[[str], None]
_tokens: set[str] = set()  # of leases that this process has


class Seen(NamedTuple):
    """Who has a lease ({}: nobody), and the version of the object that says so; 0: there is none"""

    holder: dict[str, Any]
    version: int


class Lease:
    """The object that says who has a run's folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.me = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "space": _space(),
            "token": uuid.uuid4().hex,
        }
        bucket, _, name = str(folder / NAME).partition("://")[2].partition("/")
        self._place = bucket, name
        self._version = 0
        self._client: Any = None

    def _object(self) -> Any:
        from google.cloud import storage  # pyright: ignore

        if self._client is None:
            self._client = storage.Client(project=None)  # objects need none
        bucket, name = self._place
        return self._client.bucket(bucket).blob(name)

    def seen(self) -> Seen:
        """What the object says now."""
        from google.api_core.exceptions import NotFound  # pyright: ignore[reportMissingImports]

        found = self._object()
        try:
            text = found.download_as_bytes()
        except NotFound:
            return Seen({}, 0)
        try:
            holder = json.loads(text)
        except ValueError:
            holder = {}
        return Seen(holder if isinstance(holder, dict) else {}, int(found.generation))

    def write(self, holder: dict[str, Any], version: int) -> bool:
        """Say who has it, unless somebody else has written since `version`."""
        from google.api_core.exceptions import (  # pyright: ignore[reportMissingImports]
            PreconditionFailed,
        )

        found = self._object()
        try:
            found.upload_from_string(json.dumps(holder), if_generation_match=version)
        except PreconditionFailed:
            now = self.seen()  # an answer may have been lost after the object was written
            if not holder or now.holder.get("token") != holder.get("token"):
                return False
            self._version = now.version
            return True
        self._version = int(found.generation)
        return True

    def take(self, say: Say) -> None:
        """Get the lease; UserError naming the process that has it, and goes on renewing it."""
        told = False
        while True:
            now = self.seen()
            if not now.holder or _is_gone(now.holder) or (told and self._expired(now)):
                if self.write(self.me, now.version):
                    _tokens.add(str(self.me["token"]))
                    return
            elif told:
                raise UserError(_refusal(self.folder, now.holder))
            else:
                told = True
                say(
                    f"{self.folder} is in use by {_who(now.holder)}; looking for {LEASE:g} s "
                    "whether that still runs."
                )

    def _expired(self, before: Seen) -> bool:
        """Whether nobody renews a lease for as long as it lasts."""
        end = time.monotonic() + LEASE
        while time.monotonic() < end:
            time.sleep(min(LOOK, LEASE))
            now = self.seen()
            if now.version != before.version:
                return False
        return True

    def renew(self) -> bool:
        """Go on having it; False where somebody else has it."""
        return self.write(self.me, self._version)

    def give_back(self) -> None:
        """Let the next one have it at once."""
        _tokens.discard(str(self.me["token"]))
        self.write({}, self._version)


@contextlib.contextmanager
def leased(folder: Path, say: Say) -> Iterator[None]:
    """Keep every other process out of a run's folder in a store for the time of the block."""
    if not str(folder).startswith("gs://"):
        say(f"The storage of {folder} has no locks: do not start this run twice.")
        yield
        return
    lease, ended = Lease(folder), threading.Event()
    try:
        lease.take(say)
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:  # of the library's many kinds
        raise failure("lock", folder, OSError(_said(error))) from error
    thread = threading.Thread(target=_renewed, args=(lease, ended, say), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # the store is away; the lease runs out by itself
            lease.give_back()


def _renewed(lease: Lease, ended: threading.Event, say: Say) -> None:
    while not ended.wait(BEAT):
        try:
            mine = lease.renew()
        except Exception:  # the store does not answer: the next beat asks again
            continue
        if not mine:
            say(f"{lease.folder} was taken by another process while this one slept: it ends here.")
            while not ended.wait(1.0):
                os.kill(os.getpid(), signal.SIGINT)  # the first only asks to stop, the second ends
            return


def _said(error: Exception) -> str:
    if type(error).__name__ == "NotFound":
        return "there is no such bucket"
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".:")[:200]


def _space() -> str:
    """What the numbers of processes are good for: those of another container mean others."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this very machine that has ended."""
    number = holder.get("process")
    if (holder.get("host"), holder.get("space")) != (socket.gethostname(), _space()):
        return False
    if number == os.getpid():  # a restarted container counts from the same number again
        return holder.get("token") not in _tokens
    try:
        os.kill(int(str(number)), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}"


def _refusal(folder: Path, holder: dict[str, Any]) -> str:
    return (
        f"{folder} is in use by {_who(holder)}: wait until that run has ended or stop it, or "
        "choose another --name."
    )
