"""Where runs, exports and data lie: on a disk, or in an object store (`gs://bucket/folder`).

    folder = storage.place("gs://bucket/runs/first")    # or a local path, which stays a `Path`
    (folder / "config.json").write_text("{}")

A store renames nothing and locks nothing (`object_path`). So whatever consists of several files is
sealed by the one that is written last; `written` and `local` bring such folders there and back.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from moezoo.errors import UserError

T = TypeVar("T")
R = TypeVar("R")
SCHEMES = ("gs", "s3")
# pathlib turns `gs://bucket` into `gs:/bucket`; nobody means a folder called `gs:`.
URL = re.compile(rf"({'|'.join(SCHEMES)}):/+(.*)", re.DOTALL)
BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")
UNFINISHED = ".unfinished"  # lies in a folder as long as it is not whole
AT_ONCE = 8  # files that are read or written beside each other


def place(path: Path | str) -> Path:
    """A path with the methods of `pathlib.Path`, wherever it is.

    What pathlib has made of a URL (`gs:/bucket/...`) is one again. Raises UserError for a URL
    without bucket, and where the package for its store is not installed.
    """
    found = URL.fullmatch(os.fspath(path))
    if found is None:
        return path if isinstance(path, Path) else Path(path)
    scheme, rest = found.groups()
    bucket = rest.partition("/")[0]
    if not BUCKET.fullmatch(bucket):
        raise UserError(
            f"'{scheme}://{rest}' names no bucket: write {scheme}://BUCKET/FOLDER, with a bucket "
            "of small letters, digits, '-', '_' and '.'."
        )
    # Imported here: most runs lie on disks, and its libraries take a while.
    from moezoo import object_path

    object_path.system(scheme)
    # No `Path`, but with its methods.
    stored: Any = object_path.StorePath(f"{scheme}://{rest}")
    return stored


def is_stored(path: Path | str) -> bool:
    """Whether a path is one of an object store."""
    return URL.fullmatch(os.fspath(path)) is not None


def remove_tree(folder: Path) -> None:
    """Remove a folder with everything in it; what cannot be removed stays."""
    if is_stored(folder):
        stored: Any = folder
        with contextlib.suppress(OSError):
            stored.rmtree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def each(work: Callable[[T], R], given: Iterable[T], folder: Path) -> list[R]:
    """`work` of every one, in order; beside each other where `folder` is in a store, which waits.

    Raises what the first one that fails raises.
    """
    if not is_stored(folder):
        return [work(one) for one in given]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, given))


@functools.lru_cache(maxsize=1)
def _copies() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="moezoo-store-")


def local(path: Path) -> Path:
    """A local path as it is; of one in a store a copy on this disk, for as long as the program.

    For what maps files into memory or runs them. Copied once as long as nothing changes there; what
    is not there stays a path in the store. Raises UserError for a folder that is not whole, OSError
    where the store does not answer.
    """
    if not is_stored(path) or not path.exists():
        return path
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    if path / UNFINISHED in files:
        raise UserError(f"{path} was not written to its end: write it again.")
    known = each(lambda file: f"{file} {file.stat()}", files, path)
    mark = hashlib.sha256("\n".join([str(path), *known]).encode()).hexdigest()[:16]
    target = Path(_copies().name) / mark / (path.name or "bucket")
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)

        def fetch(file: Any) -> None:
            file.fetch(unfinished / file.relative_to(path))

        each(fetch, files, path)
        unfinished.rename(target)
    return target


@contextlib.contextmanager
def written(folder: Path) -> Iterator[Path]:
    """A temporary local folder whose files are in the store's `folder` when the block ends well.

    The file that was written last is brought there last, and the folder counts as unfinished
    (`local`) until then. What was there before is replaced; where the block fails it stays.
    """
    with tempfile.TemporaryDirectory(prefix="moezoo-store-") as place:
        temporary = Path(place) / (folder.name or "bucket")
        temporary.mkdir()
        yield temporary
        found = [file for file in temporary.rglob("*") if file.is_file()]
        found.sort(key=lambda file: (file.stat().st_mtime_ns, str(file)))
        names = [file.relative_to(temporary).as_posix() for file in found]
        (folder / UNFINISHED).write_bytes(b"moezoo")
        before = [f for f in folder.rglob("*") if f.name != UNFINISHED]
        each(lambda file: file.unlink(missing_ok=True), before, folder)

        def put(name: str) -> None:
            target: Any = folder / name
            target.put(temporary / name)

        each(put, names[:-1], folder)
        each(put, names[-1:], folder)
        (folder / UNFINISHED).unlink()


def free(folder: Path) -> bool:
    """Whether nothing, or only what an interrupted `written` has left, is in a store's folder."""
    return not folder.exists() or (folder / UNFINISHED).exists()
