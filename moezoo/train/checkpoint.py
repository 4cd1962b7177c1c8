"""Checkpoints of a run: written in the background by Orbax, sealed, verified, restored anywhere.

A checkpoint is a folder named by its step:

    200/arrays/         every array, in Orbax's format
    200/config.json     the configuration that rebuilds the model
    200/manifest.json   shapes, sizes and checksums, written last

Killed at any moment, a run leaves at worst a folder without manifest, which counts for nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as orbax

from moezoo import plain_path, storage
from moezoo.errors import UserError
from moezoo.files import check_writable, failure, write_atomically
from moezoo.nn.module import unflatten
from moezoo.train import manifest, together
from moezoo.train.restore import (
    ARRAYS,
    CONFIG,
    FOLDER,
    Say,
    best,
    by_path,
    check_stored,
    find,
    folders,
    load,
    load_params,
    newest,
    read_config,
    restore,
    valid,
)

__all__ = [
    "FOLDER",
    "Checkpointer",
    "best",
    "read_config",
    "find",
    "load_params",
    "newest",
    "restore",
]

TRIES = 20  # to remove a folder


class Checkpointer:
    """Writes a run's checkpoints and resumes from them; a context manager.

    Every process of a run makes one and calls the same methods; process 0 writes what is not an
    array. Making it removes what an interrupted run left unfinished.

    Args:
      directory: the run's folder of checkpoints, on a disk that all hosts share.
      config: the configuration as JSON text, written beside every checkpoint.
      keep: how many of the newest checkpoints stay; the one with the best score stays besides.
      say: receives one sentence per checkpoint that is skipped.

    Raises UserError where the directory cannot be written, or read back from (`plain_path`).
    """

    def __init__(self, directory: Path | str, config: str, keep: int = 2, say: Say = print):
        plain_path.check(directory, "folder")
        self.directory = storage.place(directory).absolute()
        self._config, self._keep, self._say = config, keep, say
        self._damaged: set[Path] = set()
        self._passed: set[Path] = set()
        self._worker = ThreadPoolExecutor(1, "checkpoint")
        self._running: Future[None] | None = None
        if _first():
            check_writable(self.directory)
            for folder in folders(self.directory):
                if not (folder / manifest.NAME).exists():
                    _remove(folder)
        _barrier("opened")

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return self.close()
        together.tell(error)
        with contextlib.suppress(UserError):  # the first error says more
            self.close()

    def save(self, step: int, tree: Any, score: float | None = None) -> None:
        """Start writing `tree`, a pytree of arrays; returns once they may be overwritten.

        A checkpoint of this step that exists is replaced. `score` is higher for a better model.
        Raises UserError where this or the previous write failed (full disk, no permission);
        older checkpoints are then untouched.
        """
        self.wait()
        folder = self.directory / str(step)
        arrays = by_path(jax.tree.map(_array, tree))
        try:
            if _first():
                _remove(folder)
                self._damaged.discard(folder)  # from here on it is a new one
                self._passed.discard(folder)
                write_atomically(folder / CONFIG, self._config)
            # Nobody writes into a folder that process 0 is still removing.
            _barrier("replaced")
            writing = orbax.save_async(str(folder / ARRAYS), unflatten(arrays))
        except Exception as error:
            raise self._failed(folder, error) from error
        # Shapes only: the arrays' memory may be the next step's before the write is finished.
        described = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in arrays.items()}
        self._running = self._worker.submit(self._finish, writing, folder, score, described)

    def wait(self) -> None:
        """Until the checkpoint being written is complete; UserError where it failed."""
        running, self._running = self._running, None
        if running is not None:
            together.result(running)

    def close(self) -> None:
        """Wait, then end the background thread."""
        running = self._running
        try:
            self.wait()
        finally:
            # A write that waits for processes that are gone would never end.
            self._worker.shutdown(wait=running is None or running.done())

    def latest_valid(self) -> int | None:
        """The newest step whose files are all as they were written; None where there is none.

        Damaged checkpoints are skipped with one sentence each.
        """
        step = int(together.from_first(self._newest))
        return None if step < 0 else step

    def _newest(self) -> str:
        found, self._damaged = valid(self.directory, newest, self._say, self._passed)
        return "-1" if found is None else found.name

    def pass_over(self, step: int, why: str) -> None:
        """Never take this checkpoint, though its files are as they were written; say why.

        The next one that is written takes its place.
        """
        folder = self.directory / str(step)
        self._passed.add(folder)
        self._say(f"Skipping checkpoint {folder}: {why}.")

    def skipped(self) -> int:
        """How many checkpoints the last `latest_valid`, and `pass_over`, left out."""
        return int(together.from_first(lambda: str(len(self._damaged | self._passed))))

    def newest_sound(self) -> int | None:
        """The step of the newest checkpoint on the disk that `latest_valid` would take."""
        self.wait()
        found, _ = valid(self.directory, newest, lambda sentence: None, self._passed)
        return None if found is None else int(found.name)

    def restore(self, step: int, target: Any) -> Any:
        """The tree of `step`, placed like `target`; call `latest_valid` first.

        `target` has the saved tree's structure with ShapeDtypeStructs that carry shardings, on
        any mesh. Raises UserError where the checkpoint is of another model.
        """
        return load(self.directory / str(step), target)

    def _finish(
        self, writing: Any, folder: Path, score: float | None, described: dict[str, Any]
    ) -> None:
        try:
            writing.result()
            if _first():
                check_stored(folder, described)
                manifest.write(folder, int(folder.name), score, described)
                self._prune()
        except Exception as error:
            raise self._failed(folder, error) from error

    def _prune(self) -> None:
        held = {f: m for f in folders(self.directory) if (m := manifest.read(f)) is not None}
        bad = self._damaged | self._passed
        sound = sorted(held.keys() - bad, key=lambda f: held[f].step)
        scored = [folder for folder in sound if held[folder].score is not None]
        kept = {*sound[-self._keep :], *sorted(scored, key=lambda f: best(held[f]))[-1:]}
        for folder in held.keys() - kept | bad:
            _remove(folder)
        self._damaged.clear()
        self._passed.clear()

    def _failed(self, folder: Path, error: Exception) -> Exception:
        """The error to raise for a failed write, after removing its remains."""
        if _first():
            _remove(folder)
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            error = OSError(int(code[1]), os.strerror(int(code[1])))
        if isinstance(error, OSError):
            error = failure("write checkpoint", folder, error)
        if isinstance(error, UserError):
            return UserError(f"{error} Older checkpoints are kept.")
        return error


def _array(leaf: Any) -> Any:
    """Orbax takes arrays, no NumPy scalars or plain numbers."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _remove(folder: Path) -> None:
    # The manifest goes first: what remains after an interruption is an unfinished checkpoint.
    with contextlib.suppress(OSError):  # it is missing, or damage has put a folder there
        (folder / manifest.NAME).unlink()
    for _ in range(TRIES):
        storage.remove_tree(folder)
        if not folder.exists():
            return
        time.sleep(0.05)  # threads of a write that failed still put files into it


def _first() -> bool:
    return jax.process_index() == 0


def _barrier(name: str) -> None:
    together.wait(f"checkpoint {name}")
