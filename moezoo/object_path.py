"""Paths in an object store with the methods of `pathlib.Path`; `storage` makes them.

An object store has whole objects and no folders: nothing is appended, renamed or locked, a folder
is there while there is something in it, and an object appears with its last byte, or not at all.

Names and paths are `etils.epath`'s, as in Orbax. Reading and writing goes through the file system
below it (fsspec), because epath calls a file missing that could not be asked for, has no `rglob`,
and loses `gs://` in `walk`.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from etils.epath import gpath

from moezoo.errors import UserError

R = TypeVar("R")
# By scheme what to install; Orbax and TensorStore take these two.
NEEDED = {"gs": "pip install 'moezoo[gcs]'", "s3": "pip install s3fs"}


@functools.lru_cache
def system(scheme: str) -> Any:
    """The file system of a store; UserError naming what to install where it is missing."""
    import fsspec
    import fsspec.config

    # Another process may have written since: a list from before would hide its checkpoints.
    for name in ("gs", "gcs") if scheme == "gs" else (scheme,):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False
    if scheme == "gs":
        # Its search for the kind of every bucket asks for permissions that a run does not need.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise UserError(
            f"{scheme}:// needs a package that is not installed: {NEEDED[scheme]}, or name a "
            "local folder."
        ) from error


class ObjectFacts(NamedTuple):
    """What a store says of a file or folder; the names are those of `os.stat_result`."""

    st_size: int
    is_folder: bool
    version: str


class StoreError(UserError, OSError):
    """The store did not do what it was asked, so nothing is known: neither "yes" nor "no".

    An OSError for whoever knows what was to be done, one sentence where nobody does.
    """

    def __str__(self) -> str:
        return (
            f"Could not reach {self.filename}: {self.strerror}; check the bucket's name, your "
            "permissions and the network."
        )


def _told(method: Callable[..., R]) -> Callable[..., R]:
    """Errors of a store's library, which are of many kinds, as those of the system."""

    @functools.wraps(method)
    def told(self: StorePath, *given: Any, **more: Any) -> R:
        try:
            return method(self, *given, **more)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "it is not there", str(self)) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None and error.strerror:
                raise  # ours, or of this disk
            raise StoreError(errno.EIO, _line(error), str(self)) from error

    return told


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"the store answers {(lines or [type(error).__name__])[0].rstrip('.:')[:200]}"


class StorePath(gpath.PosixGPath):
    """A path in an object store with the methods of `pathlib.Path` that moezoo uses.

    Every error is an OSError; a question that was not answered is one, too (`StoreError`).
    """

    @property
    def _store(self) -> Any:
        return system(str(self).partition(":")[0])

    @_told
    def _about(self) -> ObjectFacts | None:
        try:
            found = self._store.info(str(self))
        except FileNotFoundError:
            return None
        version = str(found.get("generation") or found.get("ETag") or found.get("etag") or "")
        return ObjectFacts(int(found.get("size") or 0), found.get("type") == "directory", version)

    def stat(self) -> ObjectFacts:  # type: ignore[override]
        """Size and kind; FileNotFoundError where nothing is."""
        found = self._about()
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "it is not there", str(self))
        return found

    def exists(self) -> bool:
        """Whether there is an object of this name, or one below it."""
        return self._about() is not None

    def is_dir(self) -> bool:
        """Whether there is an object below this name."""
        found = self._about()
        return found is not None and found.is_folder

    def is_file(self) -> bool:
        """Whether there is an object of this name."""
        found = self._about()
        return found is not None and not found.is_folder

    def is_symlink(self) -> bool:
        """Stores have no links."""
        return False

    def is_absolute(self) -> bool:
        """It begins with its store."""
        return True

    def absolute(self) -> StorePath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> StorePath:
        """Itself."""
        return self

    def expanduser(self) -> StorePath:
        """Itself."""
        return self

    @_told
    def iterdir(self) -> Iterator[StorePath]:  # type: ignore[override]
        """What lies directly below; nothing where nothing is, as in an empty folder."""
        try:
            found = self._store.ls(str(self), detail=False)
        except FileNotFoundError:
            found = []
        names = {str(one).rstrip("/").rpartition("/")[2] for one in found if _below(one, self)}
        return iter([self / name for name in sorted(names)])

    @_told
    def rglob(self, pattern: str) -> Iterator[StorePath]:  # type: ignore[override]
        """All files below whose name fits the pattern; there are no folders."""
        found = self._store.find(str(self)) if self.exists() else []
        scheme = str(self).partition("://")[0]
        paths = [StorePath(f"{scheme}://{one.partition('://')[2] or one}") for one in found]
        return iter([path for path in paths if fnmatch.fnmatch(path.name, pattern)])

    def glob(self, pattern: str) -> Iterator[StorePath]:  # type: ignore[override]
        """Those directly below whose name fits the pattern."""
        return iter([path for path in self.iterdir() if fnmatch.fnmatch(path.name, pattern)])

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:  # type: ignore[override]
        """Nothing is to be made: a folder is there with its first file."""

    @_told
    def read_bytes(self) -> bytes:
        """The whole object."""
        return self._store.cat_file(str(self))

    def read_text(self, encoding: str | None = None) -> str:
        """The whole object as UTF-8."""
        return self.read_bytes().decode()

    @_told
    def write_bytes(self, data: bytes) -> int:
        """The whole object at once; a reader meets the old one or the new one."""
        try:
            self._store.pipe_file(str(self), bytes(data))
        except FileNotFoundError as error:
            raise StoreError(errno.ENXIO, "there is no such bucket", str(self)) from error
        return len(data)

    def write_text(self, data: str, *more: Any, **named: Any) -> int:  # type: ignore[override]
        """The whole object at once, as UTF-8."""
        return self.write_bytes(data.encode())

    @_told
    def open(self, mode: str = "rb", **more: Any) -> Any:  # type: ignore[override]
        """To read bytes in pieces; a store takes nothing in pieces."""
        if mode != "rb":
            raise NotImplementedError(f"{self} can only be opened to read bytes")
        size = self.stat().st_size
        # Below it, one request is cheaper than a reader that asks for blocks.
        return io.BytesIO(self.read_bytes()) if size < 2**23 else self._store.open(str(self), "rb")

    @_told
    def unlink(self, missing_ok: bool = False) -> None:
        """Remove an object."""
        try:
            self._store.rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """Nothing is to be removed: a folder goes with its last file."""

    @_told
    def rmtree(self, missing_ok: bool = True) -> None:
        """Remove everything below."""
        with contextlib.suppress(FileNotFoundError):
            self._store.rm(str(self), recursive=True)

    def rename(self, target: Any) -> Any:
        """Refused: a store copies every byte instead, and may be interrupted half way."""
        raise OSError(errno.EOPNOTSUPP, "an object store renames nothing", str(self))

    replace = rename

    @_told
    def fetch(self, target: Path) -> None:
        """Copy an object to a local file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._store.get_file(str(self), str(target))

    @_told
    def put(self, source: Path) -> None:
        """Copy a local file to this object."""
        self._store.put_file(str(source), str(self))


def _below(found: str, folder: StorePath) -> bool:
    """Whether a listed name is not the folder's own, which some programs write as an object."""
    own = str(folder).partition("://")[2].strip("/")
    return str(found).partition("://")[2].strip("/") != own and str(found).strip("/") != own
